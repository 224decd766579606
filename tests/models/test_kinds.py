"""Kinds of models that can't be unlearned are refused in one sentence, before any work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import FORGET, TinyNet, tiny, tiny_data, untouched
from torch import Tensor, nn

import zsu_fast
from zsu_fast import ModelError
from zsu_fast.models.kinds import check_kind
from zsu_fast.models.prepare import prepare_model

SHAPE = (3, 8, 8)


def exported() -> Any:
    return torch.export.export(tiny(), (tiny_data(4)[0],))


def quantised(dynamic: bool) -> nn.Module:
    from torch.ao import quantization as ao

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamic:
            return ao.quantize_dynamic(tiny(), {nn.Linear}, dtype=torch.qint8)
        model = nn.Sequential(ao.QuantStub(), tiny(), ao.DeQuantStub()).eval()
        model.qconfig = ao.get_default_qconfig("x86")
        observed = ao.prepare(model)
        observed(tiny_data(8)[0])
        return ao.convert(observed)


def with_weight(convert: Callable[[Tensor], Tensor]) -> nn.Module:
    model = tiny()
    model.fc2.weight = nn.Parameter(convert(model.fc2.weight.detach()), requires_grad=False)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return TinyNet()


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(tiny())


def traced() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(tiny(), tiny_data(4)[0])


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "script": (scripted, "it is TorchScript.*was made from"),
    "trace": (traced, "it is TorchScript.*was made from"),
    "a scripted part": (lambda: nn.Sequential(scripted()), "its module '0' is TorchScript"),
    "exported program": (exported, "exported program.*that it was exported from"),
    "module of an exported program": (lambda: exported().module(), "exported program"),
    "unflattened": (lambda: torch.export.unflatten(exported()), "exported program"),
    "dynamically quantised": (lambda: quantised(True), "'fc1' is a quantised Linear.*before quant"),
    "statically quantised": (lambda: quantised(False), "a quantised Quantize.*before quant"),
    "int8": (lambda: with_weight(lambda w: w.to(torch.int8)), r"fc2\.weight is torch\.int8"),
    "float8": (
        lambda: with_weight(lambda w: w.to(torch.float8_e4m3fn)), "fc2.weight is torch.float8"
    ),
    "meta": (on_meta, r"conv\.weight is on the device 'meta'.*load its weights"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), "lazy.*Run the model once"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_refused_kinds(kind: str) -> None:
    make, match = KINDS[kind]
    model = make()
    for use in (
        lambda: zsu_fast.unlearn(model, FORGET),
        lambda: zsu_fast.synthesize(model, input_shape=SHAPE),
        lambda: zsu_fast.audit(model, model, FORGET, input_shape=SHAPE),
        lambda: zsu_fast.plan(model, FORGET),
    ):
        with pytest.raises(ModelError, match=match) as caught:
            use()
        assert len(str(caught.value)) < 250


def test_sharded_models_are_refused() -> None:
    class FullyShardedDataParallel(nn.Sequential):
        """Stands in for torch's, which needs a process group."""

    with pytest.raises(ModelError, match=r"FullyShardedDataParallel.*Gather the full state dict"):
        check_kind(nn.Sequential(FullyShardedDataParallel(tiny())))


@pytest.mark.parametrize(
    "model",
    [
        with_weight(lambda w: w.half()),
        torch.fx.symbolic_trace(tiny()),
        nn.Sequential(tiny(), nn.ParameterList([nn.Parameter(torch.ones(2, 2).long(), False)])),
    ],
    ids=["half", "torch.fx", "whole numbers as a table"],
)
def test_kinds_that_are_not_refused(model: nn.Module) -> None:
    check_kind(model)


# --- forward ---------------------------------------------------------------------------------


class ByKeyword(TinyNet):
    def forward(self, *, pixel_values: Tensor, labels: Any = None) -> Tensor:  # noqa: ARG002
        return super().forward(pixel_values)


class TwoInputs(TinyNet):
    def forward(self, x: Tensor, metadata: Tensor) -> Tensor:  # noqa: ARG002
        return super().forward(x)


class ChannelsLast(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize("shape", [None, SHAPE])
@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (ByKeyword, r"by keyword only \(pixel_values=\).*self\.model\(pixel_values=x\)"),
        (TwoInputs, r"needs 2 inputs \(x, metadata\).*self\.model\(x, \.\.\.\)"),
        (ChannelsLast, r"channels last.*x\.permute\(0, 2, 3, 1\)"),
    ],
)
def test_other_inputs_than_one_image_tensor(kind: Any, match: str, shape: Any) -> None:
    model = kind().eval()
    with untouched(model), pytest.raises(ModelError, match=match):
        prepare_model(model, input_shape=shape)


@pytest.mark.parametrize("kind", [TinyNet, ChannelsLast])
def test_a_shape_with_the_channels_last(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"input_shape: got \(8, 8, 3\).*\(channels, height"):
        prepare_model(kind().eval(), input_shape=(8, 8, 3))


def test_the_wrapper_that_the_message_proposes() -> None:
    class Wrapped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.permute(0, 2, 3, 1))

    model = ChannelsLast().eval()
    model.load_state_dict(tiny().state_dict())
    found = prepare_model(Wrapped(model), input_shape=SHAPE)
    assert torch.equal(found.model(tiny_data(3)[0]), tiny()(tiny_data(3)[0]))


def test_optional_inputs_are_no_obstacle() -> None:
    class Optional(TinyNet):
        def forward(self, x: Tensor, mask: Any = None, *rest: Any, **more: Any) -> Tensor:  # noqa: ARG002
            return super().forward(x)

    assert prepare_model(Optional().eval(), input_shape=SHAPE).classes == 5
