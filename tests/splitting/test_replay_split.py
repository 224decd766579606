"""Splits by record and replay: models with control flow on values."""

from __future__ import annotations

import pytest
import torch
from splits import CPU, Branching, assert_splits_right, split_before
from support import tiny, tiny_data, untouched
from torch import Tensor

from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting.replay_split import ReplayTail
from zsu_fast.splitting.split import Split, split_at


@pytest.mark.parametrize("name", ["conv", "bn", "fc1", "drop", "fc2"])
def test_control_flow_goes_by_replay(name: str) -> None:
    model, images = Branching().eval(), tiny_data(4)[0]
    model.load_state_dict(tiny().state_dict())
    with untouched(model):
        found = assert_splits_right(model, name, images)
    assert isinstance(found.tail, ReplayTail)
    traced = split_before(tiny(), name, images)
    assert found.parameters == traced.parameters
    calls: list[int] = []
    work = found.tail.model.module
    work.conv.weight.register_hook(lambda _g: calls.append(1))
    found.tail(*found.features(images)).sum().backward()
    assert bool(calls) == (name == "conv")  # the tail does not train what is before it


def test_a_replayed_backbone_does_not_run_again() -> None:
    model, images = Branching().eval(), tiny_data(4)[0]
    found = split_before(model, "fc2", images)
    features = found.features(images)
    with torch.no_grad():
        want = found.tail(*features)
        found.tail.model.module.conv.weight.fill_(float("nan"))  # would show if it ran
        assert torch.equal(found.tail(*features), want)


def test_a_replay_leaves_no_patched_forward_behind() -> None:
    class Failing(Branching):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.broken:
                raise RuntimeError("late")
            return y

    images = tiny_data(4)[0]
    found = split_before(Failing().eval(), "fc2", images)
    features = found.features(images)
    inner = found.tail.model.module
    inner.broken = True
    with pytest.raises(RuntimeError, match="late"):
        found.tail(*features)
    assert all("forward" not in m.__dict__ for m in inner.modules())
    inner.broken = False
    assert torch.isfinite(found.tail(*features)).all()


def test_a_replay_keeps_what_the_tail_reads_and_no_more() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        image_size=64, num_labels=3,
    )  # fmt: skip
    model, images = transformers.ViTForImageClassification(config).eval(), torch.rand(3, 3, 64, 64)
    hidden = 17 * 24 * 4  # bytes of an image's hidden state: 16 patches and the class token

    def crossing(name: str) -> tuple[Split, float]:
        found = split_at(working_copy(model, CPU), name, images, "a test")
        return found, sum(f.nbytes for f in found.backbone(images)) / len(images) / hidden

    last_block, states = crossing("vit.layers.3")
    assert isinstance(last_block.tail, ReplayTail)
    assert states == 1
    assert crossing("vit.layers.3.mlp.fc1")[1] == 3  # its input and two terms of the skip
    assert crossing("vit.layernorm")[1] == 1
    assert crossing("classifier")[1] == pytest.approx(1 / 17)
    with torch.no_grad():
        want = model(images).logits
        features = last_block.features(images)
        assert torch.allclose(last_block.tail(*features), want, atol=1e-5)


def test_a_replay_keeps_all_where_python_looks_at_values() -> None:
    class Gated(Branching):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.bn(self.conv(x))).flatten(1)
            y = self.act(self.fc1(x))
            return self.fc2(y if bool(x.max() < 50) else -y)  # x is no input of what follows

    model, images = Gated().eval(), tiny_data(4)[0]
    found = split_before(model, "fc2", images)
    assert len(found.backbone(images)) > 1
    for batch in (images, -images, 100 * images):
        with torch.no_grad():
            assert torch.allclose(found.tail(*found.backbone(batch)), model(batch), atol=1e-5)
