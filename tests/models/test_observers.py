"""The user's hooks and the package's copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import FORGET, QUICK, assert_forgets, same_bits, tiny, tiny_data, unlearned_tiny
from torch import Tensor, nn
from torch.nn.utils import prune

from zsu_fast import ModelError, unlearn
from zsu_fast.models.observers import has_hooks, remove_observers
from zsu_fast.models.prepare import prepare_model

pytestmark = pytest.mark.filterwarnings("ignore:level. output")
SEEN: list[Tensor] = []


def into_a_global(_module: nn.Module, _args: Any, output: Tensor) -> None:
    SEEN.append(output)


class Collector:
    def __init__(self) -> None:
        self.calls, self.last = 0, None

    def __call__(self, _module: nn.Module, args: Any) -> None:
        self.calls += 1
        self.last = args


def test_hooks_that_look_on_do_not_fire() -> None:
    model, seen, collector = tiny(), [], Collector()
    model.fc1.register_forward_hook(lambda _m, _i, o: seen.append(o))
    model.fc2.register_forward_hook(into_a_global)
    model.conv.register_forward_pre_hook(collector)
    model.fc2.register_full_backward_hook(lambda _m, _i, o: seen.append(o))
    result = unlearn(model, FORGET, **QUICK)
    assert (seen, SEEN, collector.calls, collector.last) == ([], [], 0, None)
    assert same_bits(result, unlearned_tiny())
    result(tiny_data(2)[0])
    assert len(seen) == 1  # the result is a copy with the user's hooks
    SEEN.clear()


def test_a_hook_that_changes_the_output_is_part_of_the_model() -> None:
    model, seen = tiny(), []

    def scale(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        seen.append(1)
        return 2 * output

    def hide_in_place(_module: nn.Module, _args: Any, output: Tensor) -> None:
        output[:, 0] = -9.0

    model.fc1.register_forward_hook(scale)
    model.fc2.register_forward_hook(hide_in_place)
    model.fc1.register_forward_hook(lambda _m, _i, o: seen.append(o))
    images = tiny_data(4)[0]
    work = prepare_model(model).model
    with torch.no_grad():
        assert torch.equal(work(images), model(images))
    assert len(work.module.fc1._forward_hooks) == len(work.module.fc2._forward_hooks) == 1
    assert len(model.fc1._forward_hooks) == 2


def test_kept_hooks_run_in_their_order_and_leave_no_trace_while_tried() -> None:
    model, calls = tiny(), []
    model.fc1.register_forward_hook(lambda _m, _i, o: 2 * o)
    model.fc1.register_forward_hook(lambda _m, _i, _o: calls.append(1))
    model.fc1.register_forward_hook(lambda _m, _i, o: o + 1)
    images = tiny_data(2)[0]
    with torch.no_grad():
        want = model(images)
        calls.clear()
        assert len(remove_observers(model, images)) == 2
        assert torch.equal(model(images), want)
    assert calls == []


def test_hooks_of_torch_stay() -> None:
    model = tiny()
    prune.l1_unstructured(model.fc2, "weight", 0.3)
    model.fc1.register_forward_hook(lambda _m, _i, _o: None)
    work = prepare_model(model).model.module
    assert len(work.fc2._forward_pre_hooks) == 1
    assert not has_hooks(work)
    assert has_hooks(model)


def test_a_model_that_cannot_be_copied_is_refused_before_the_work() -> None:
    model, events = tiny(), []

    class Uncopyable:
        def __call__(self, *_args: Any) -> None:
            pass

        def __deepcopy__(self, _memo: Any) -> Any:
            raise RuntimeError("never")

    model.fc1.register_forward_hook(Uncopyable())
    with pytest.raises(ModelError, match="cannot be copied"):
        unlearn(model, FORGET, callback=events.append, **QUICK)
    assert events == []
    changed = unlearn(model, FORGET, inplace=True, **QUICK)  # needs no copy with its hooks
    assert_forgets(changed, FORGET)
