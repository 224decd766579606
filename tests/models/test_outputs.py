"""Which item of a model's output holds the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import FORGET, QUICK, TinyNet, assert_forgets, changed_tensors, tiny, tiny_data
from torch import Tensor, nn

import zsu_fast
from zsu_fast import ArgumentError, ModelError, audit, evaluate, mask, split, synthesize, unlearn
from zsu_fast.models.outputs import is_ambiguous, pick_logits
from zsu_fast.models.prepare import prepare_model

SHAPE = (3, 8, 8)


class Features(TinyNet):
    """Returns ``wrap(features [N, 32], logits [N, 5])``."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap
        self.load_state_dict(tiny().state_dict())
        self.eval()

    def forward(self, x: Tensor) -> Any:
        x = self.act(self.bn(self.conv(x))).flatten(1)
        features = self.act(self.fc1(x))
        return self.wrap(features, self.fc2(self.drop(features)))


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], int | str | None]] = {
    "features first": (lambda f, y: (f, y), 1),
    "logits first": (lambda f, y: (y, f), 0),
    "dict": (lambda f, y: {"embedding": f, "scores": y}, "scores"),
    "dict with logits": (lambda f, y: {"embedding": f, "logits": y}, None),
    "probabilities too": (lambda _, y: [y, y.softmax(1)], 0),
    "a map first": (lambda f, y: (f[:, :, None, None], y), 1),
    "nothing first": (lambda _, y: (None, y), 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_item_that_the_last_layer_makes(form: str) -> None:
    wrap, choice = FORMS[form]
    model = Features(wrap)
    found = prepare_model(model, input_shape=SHAPE)
    assert found.classes == 5
    assert found.model.output == choice
    assert torch.equal(found.model(tiny_data(6)[0]), tiny()(tiny_data(6)[0]))
    result = unlearn(model, FORGET, input_shape=SHAPE, **QUICK)
    assert changed_tensors(model, result) == {"fc2.weight", "fc2.bias"}
    assert_forgets(result, FORGET)  # evaluate() finds the same item
    assert evaluate(model, tiny_data(), FORGET).forget_accuracy == 100


def test_frozen_weights_do_not_hide_the_last_layer() -> None:
    model = Features(FORMS["features first"][0]).requires_grad_(False)
    assert evaluate(model, tiny_data(), FORGET).forget_accuracy == 100


class TwoHeads(TinyNet):
    def __init__(self, columns: int = 5) -> None:
        super().__init__()
        self.other = nn.Linear(32, columns)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.act(self.fc1(self.act(self.bn(self.conv(x))).flatten(1)))
        return self.fc2(x), self.other(x)


USES: dict[str, Callable[[nn.Module, dict[str, Any]], Any]] = {
    "unlearn": lambda m, o: unlearn(m, FORGET, input_shape=SHAPE, **QUICK, **o),
    "evaluate": lambda m, o: evaluate(m, tiny_data(), FORGET, **o),
    "audit": lambda m, o: audit(m, m, FORGET, input_shape=SHAPE, progress=False, **o),
    "split": lambda m, o: split(m, "last", input_shape=SHAPE, **o),
    "synthesize": lambda m, o: synthesize(
        m, [1], per_class=1, input_shape=SHAPE, progress=False, **o
    ),
    "mask": lambda m, o: mask(m, FORGET, **o)(tiny_data(4)[0]),
    "plan": lambda m, o: zsu_fast.plan(m, FORGET, input_shape=SHAPE, **o),
}


@pytest.mark.parametrize("use", USES)
def test_two_heads_need_a_choice(use: str) -> None:
    model = TwoHeads().eval()
    with pytest.raises(ModelError, match=r"several tensors.*output="):
        USES[use](model, {})
    USES[use](model, {"output": 1})


@pytest.mark.parametrize("output", [1, lambda items: items[1]])
def test_the_chosen_head_is_unlearned(output: Any) -> None:
    model = TwoHeads().eval()
    run = zsu_fast.ZeroShotUnlearner(model, FORGET, input_shape=SHAPE, output=output, **QUICK)
    assert changed_tensors(model, run.run()) <= {"other.weight", "other.bias"}
    assert run.split_point.name == "other"
    assert " at 0x" not in str(run.record.settings["output"])


def test_the_head_with_as_many_columns_as_there_are_classes() -> None:
    model = TwoHeads(7).eval()
    model.num_classes = 7
    assert prepare_model(model, input_shape=SHAPE).classes == 7


@pytest.mark.parametrize("output", [2, "logits", lambda _: None])
def test_an_item_that_is_not_there(output: Any) -> None:
    with pytest.raises(ArgumentError, match=r"output: got .*items 0, 1.*Pass the index"):
        unlearn(TwoHeads().eval(), FORGET, input_shape=SHAPE, output=output, **QUICK)


@pytest.mark.parametrize("output", [1.5, True, (0,)])
def test_an_output_of_another_type(output: Any) -> None:
    for use in USES.values():
        with pytest.raises(ArgumentError, match="output: got"):
            use(tiny(), {"output": output})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f, _: {"pooler_output": f},
        lambda f, _: {"last_hidden_state": f[:, None], "pooler_output": f.tanh()},
    ],
)
def test_an_embedding_in_a_dict_is_refused(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    model = Features(wrap)
    for use in ("unlearn", "evaluate"):
        with pytest.raises(ModelError, match=r"embedding \(.*'pooler_output'\).*its classifier"):
            USES[use](model, {})


def test_what_is_ambiguous() -> None:
    scores = torch.zeros(2, 5)
    assert not is_ambiguous(scores)
    assert not is_ambiguous((scores, None))
    assert not is_ambiguous({"logits": scores, "aux": scores})
    assert is_ambiguous((scores, scores))
    assert is_ambiguous((None, scores))
    assert torch.equal(pick_logits({"a": scores, "b": scores + 1}, "b"), scores + 1)
