"""Splits by symbolic tracing: values beside tensors that pass from the backbone to the tail."""

from __future__ import annotations

import pytest
import torch
from splits import assert_splits_right
from support import Returning, TinyNet, tiny_data
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting.fx_split import split_by_fx


def test_a_batch_size_taken_from_the_shape_is_not_frozen() -> None:
    class Sized(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            n = x.size(0)
            x = self.bn(self.conv(x))
            return self.fc2(F.relu(self.fc1(x.view(n, -1))).view(n, -1))

    model, images = Sized().eval(), tiny_data(6)[0]
    for name in ("bn", "fc1", "fc2"):
        assert_splits_right(model, name, images)


class Quiet(nn.Module):
    """Returns nothing, which tracing can't know."""

    def forward(self, _x: Tensor) -> None:
        return None


def test_a_branch_that_tracing_takes_wrongly_is_left_to_replay() -> None:
    class Optional(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = Quiet()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.bn(self.conv(x))).flatten(1)
            extra = self.auxiliary(x)
            x = self.fc1(x if extra is None else x + extra)  # a proxy is never None
            return self.fc2(F.relu(x))

    model, images = Optional().eval(), tiny_data(6)[0]
    assert split_by_fx(working_copy(model, torch.device("cpu")), "fc2", images) is None
    for name in ("fc1", "fc2"):
        assert_splits_right(model, name, images)


def test_a_transformers_vit_is_split_ahead_of_its_layers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_labels=5,
    )  # fmt: skip
    model = Returning(transformers.ViTForImageClassification(config), lambda out: out.logits)
    images = tiny_data(6)[0]
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name in (linear[0], linear[-2], linear[-1]):
        assert_splits_right(model.eval(), name, images)
