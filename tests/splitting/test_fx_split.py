"""Splits by symbolic tracing: values beside tensors that pass from the backbone to the tail."""

from __future__ import annotations

from splits import assert_splits_right
from support import TinyNet, tiny_data
from torch import Tensor
from torch.nn import functional as F


def test_a_batch_size_taken_from_the_shape_is_not_frozen() -> None:
    class Sized(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            n = x.size(0)
            x = self.bn(self.conv(x))
            return self.fc2(F.relu(self.fc1(x.view(n, -1))).view(n, -1))

    model, images = Sized().eval(), tiny_data(6)[0]
    for name in ("bn", "fc1", "fc2"):
        assert_splits_right(model, name, images)
