"""The whole procedure: what is forgotten, what is kept, and that the user's model is safe."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    QUICK,
    SPEC,
    Answer,
    Returning,
    TinyNet,
    assert_forgets,
    bits,
    changed_tensors,
    same_bits,
    tiny,
    tiny_data,
    train,
    untouched,
)
from torch import Tensor, nn
from torch.nn import functional as F

import zsu_fast
from zsu_fast import (
    ArgumentError,
    ModelError,
    ZeroShotUnlearner,
    evaluate,
    mask,
    paper_preset,
    synthesize,
    unlearn,
)
from zsu_fast.models import zoo
from zsu_fast.models.checkpoint import load_into
from zsu_fast.models.parameters import replace_parameters, unwrap, weights_hash
from zsu_fast.runtime.progress import Event
from zsu_fast.training.features import FeatureSettings
from zsu_fast.training.fit_task import make_fit_task

FORGET = [1, 3]


# --- the targets (benchmarks/end_to_end/table1.py has the whole tables) ----------------------


@pytest.mark.shared
def test_lenet5_forgets_mnist_digits(mnist: tuple[Tensor, Tensor]) -> None:
    model, forget = zoo.load("lenet5"), [1, 2, 3, 4]
    with untouched(model):
        result = evaluate(unlearn(model, forget, progress=False), mnist, forget)
    baseline = evaluate(mask(model, forget), mnist, forget)
    assert result.forget_accuracy <= 0.05, str(result)
    assert result.retain_accuracy >= baseline.retain_accuracy - 0.2, str(result)


@pytest.mark.shared
@pytest.mark.parametrize("objective", ["masked", "differential"])
def test_karpathynet_forgets_cifar10_classes(
    objective: str, cifar10: tuple[Tensor, Tensor]
) -> None:
    model, forget = zoo.load("karpathynet"), [3, 4, 8]
    data = (model.input_spec.normalise(cifar10[0]), cifar10[1])
    baseline = evaluate(mask(model, forget), data, forget)
    with untouched(model):
        changed = unlearn(model, forget, objective=objective, progress=False)
    result = evaluate(changed, data, forget)
    if objective == "masked":
        assert result.forget_accuracy <= 0.1, str(result)
        assert result.retain_accuracy >= baseline.retain_accuracy - 0.4, str(result)
    else:  # the rival, without a bar of its own: it forgets and does not collapse
        assert result.forget_accuracy <= 1, str(result)
        assert result.retain_accuracy >= baseline.retain_accuracy - 2, str(result)


@pytest.mark.shared
def test_public_resnet20_forgets(cifar10: tuple[Tensor, Tensor], resnet20_weights: Any) -> None:
    model, forget = zoo.build("resnet20_cifar"), [0, 6]
    load_into(model, resnet20_weights)
    data = (model.input_spec.normalise(cifar10[0][:4000]), cifar10[1][:4000])
    baseline = evaluate(mask(model, forget), data, forget)
    with untouched(model):
        result = evaluate(unlearn(model, forget, progress=False), data, forget)
    assert result.forget_accuracy <= 0.5, str(result)
    assert result.retain_accuracy >= baseline.retain_accuracy - 0.6, str(result)


# --- what comes back -------------------------------------------------------------------------


def test_the_default_is_a_copy_that_forgets() -> None:
    model = tiny()
    assert evaluate(model, tiny_data(), FORGET).overall_accuracy > 97
    with untouched(model):
        result = unlearn(model, FORGET, **QUICK)
    assert result is not model
    assert type(result) is TinyNet
    assert not result.training
    assert_forgets(result, FORGET)
    storage = {p.data_ptr() for p in model.parameters()}
    assert not storage & {p.data_ptr() for p in result.parameters()}


def test_inplace_changes_the_same_object() -> None:
    model = tiny()
    original, identities = copy.deepcopy(model), [id(p) for p in model.parameters()]
    copied = unlearn(model, FORGET, **QUICK)
    assert unlearn(model, FORGET, inplace=True, **QUICK) is model
    assert [id(p) for p in model.parameters()] == identities
    assert not same_bits(model, original)
    assert same_bits(model, copied)


@pytest.mark.parametrize("tail", ["fc1", "fc2", "last", "conv"])
def test_only_the_tail_changes(tail: str) -> None:
    model = tiny()
    runner = ZeroShotUnlearner(model, FORGET, tail=tail, **QUICK)
    result = runner.run()
    changed = changed_tensors(model, result)
    assert changed == set(runner.split_point.parameters)
    later = {"fc2": {"fc2"}, "last": {"fc2"}, "fc1": {"fc1", "fc2"}}
    assert {n.split(".")[0] for n in changed} == later.get(tail, {"conv", "bn", "fc1", "fc2"})
    if tail != "conv":  # the whole network: needs more impressions than these
        assert_forgets(result, FORGET)


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    model = tiny()
    first = unlearn(model, FORGET, seed=3, **QUICK)
    torch.manual_seed(99)  # the global generator plays no part
    assert same_bits(first, unlearn(model, FORGET, seed=3, **QUICK))
    assert not same_bits(first, unlearn(model, FORGET, seed=4, **QUICK))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    unlearn(tiny(), FORGET, **QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_differential_objective_forgets() -> None:
    result = unlearn(tiny(), FORGET, objective="differential", **QUICK)
    assert_forgets(result, FORGET, most=5, least=85)


def test_paper_preset_runs_and_follows_the_paper() -> None:
    preset = paper_preset() | {"impressions_per_class": 4, "max_steps": 30, "steps": 10}
    runner = ZeroShotUnlearner(tiny(), FORGET, progress=False, **preset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may not forget is its point
        result = runner.run()
    assert paper_preset()["weights"] == (0.9, 0.1)
    assert (runner.impressions.target == 1).all()
    assert (runner.impressions.steps == 30).all()
    assert runner.history[-1].step == 10
    assert "all 10 steps" in runner.stopped
    assert all(p.isfinite().all() for p in result.parameters())
    known = inspect.signature(ZeroShotUnlearner).parameters
    assert set(paper_preset()) <= set(known)


def test_the_head_runs_once_whatever_the_steps() -> None:
    runner = ZeroShotUnlearner(tiny(), FORGET, tail="fc2", **QUICK)
    runner.synthesise()
    runner.split()
    rows: list[int] = []
    runner.work.module.conv.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    runner.fit()
    assert sum(rows) == len(runner.impressions)
    assert runner.history[-1].step >= 60


def test_steps_one_by_one_equal_run() -> None:
    runner = ZeroShotUnlearner(tiny(), FORGET, **QUICK)
    made = runner.synthesise()
    cut = runner.split()
    fit = runner.fit()
    result = runner.apply()
    assert runner.impressions is made
    assert runner.split_point is cut
    assert runner.history is fit.history
    assert runner.stopped == fit.stopped != ""
    assert same_bits(result, unlearn(tiny(), FORGET, **QUICK))


def test_steps_out_of_order() -> None:
    runner = ZeroShotUnlearner(tiny(), FORGET, **QUICK)
    assert runner.history == []
    assert runner.stopped == ""
    with pytest.raises(ArgumentError, match=r"apply\(\): called before fit"):
        runner.apply()
    runner.fit()  # makes what is missing
    assert_forgets(runner.apply(), FORGET)


def test_given_impressions_are_used(tmp_path: Any) -> None:
    model = tiny()
    made = synthesize(model, per_class=8, progress=False)
    made.save(tmp_path / "made.safetensors")
    loaded = zsu_fast.ClassImpressions.load(tmp_path / "made.safetensors")
    runner = ZeroShotUnlearner(model, FORGET, impressions=loaded, **QUICK)
    result = runner.run()
    assert runner.impressions is loaded
    assert same_bits(result, unlearn(model, FORGET, **QUICK))


def test_given_impressions_in_any_order() -> None:
    model = tiny()
    made = synthesize(model, per_class=8, progress=False)
    order = torch.empty(40, dtype=torch.int64)
    every_fourth = torch.arange(40) % 4 == 3  # all of class 1 and two of class 3
    order[every_fourth] = torch.tensor([*range(8, 16), 24, 25])
    order[~every_fourth] = torch.tensor([*range(8), *range(16, 24), *range(26, 40)])
    shuffled = copy.copy(made)
    for name in ("images", "labels", "confidence", "target", "steps", "hit"):
        setattr(shuffled, name, getattr(made, name)[order])
    run = ZeroShotUnlearner(model, FORGET, impressions=shuffled, **QUICK)
    assert_forgets(run.run(), FORGET)
    cut, labels = run.split_point, shuffled.labels
    assert cut is not None
    task = make_fit_task(
        run.work, cut, cut.features(shuffled.images), labels, run.forget_mask,
        run.options.objective, FeatureSettings(mixtures=0), seed=0,
    )  # fmt: skip
    both = (task.train.label, task.validation.label)
    assert [torch.bincount(label).tolist() for label in both] == [[6] * 5, [2] * 5]


@pytest.mark.parametrize("change", ["few", "shape", "classes"])
def test_given_impressions_that_do_not_fit(change: str) -> None:
    model = tiny()
    if change == "few":
        made = synthesize(model, [0, 1, 2], per_class=4, progress=False)
    elif change == "shape":
        made = synthesize(model, per_class=4, progress=False)
        made.spec = zsu_fast.InputSpec((3, 9, 9), made.spec.mean, made.spec.std)
    else:
        made = synthesize(model, per_class=4, progress=False)
        made.labels[-1] = 5
    with untouched(model), pytest.raises(ArgumentError, match=r"impressions: got .* Pass some of"):
        unlearn(model, FORGET, impressions=made, **QUICK)


def test_one_impression_of_each_of_forty_classes() -> None:
    draw = torch.Generator().manual_seed(0)
    patterns = torch.rand(40, 3, 8, 8, generator=draw)
    labels = torch.arange(400) % 40
    noisy = patterns[labels] + 0.1 * torch.randn(400, 3, 8, 8, generator=draw)
    images, forget = SPEC.normalise(noisy.clamp(0, 1) * 255), [7, 11, 30]
    model = TinyNet(40)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    model.eval()  # neither dropout nor BatchNorm's batches: it learns faster
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    assert evaluate(model, (images, labels), forget).overall_accuracy > 97
    few = QUICK | {"impressions_per_class": 1, "mixtures": None}
    runner = ZeroShotUnlearner(model, forget, **few)
    result = evaluate(runner.run(), (images, labels), forget)
    assert len(runner.impressions) == 40
    assert runner.split_point.name == "fc2"
    assert "with one impression per class" in runner.split_point.reason
    assert result.forget_accuracy <= 5, str(result)
    assert result.retain_accuracy >= 90, str(result)


# --- bad input: forget -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "forget",
    [[], set(), range(5), [5], [-1], -1, [1, 1], True, [True], 1.0, [1.5], "1", ["1"], None,
     np.array([0.5]), torch.tensor([True, False, False, False, False]), torch.tensor([1.0])],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True])
def test_a_refused_forget_leaves_the_model_alone(forget: Any, inplace: bool) -> None:
    model = tiny().train()
    with untouched(model), pytest.raises(ArgumentError, match=r"^forget: got .+\. "):
        unlearn(model, forget, inplace=inplace)


@pytest.mark.parametrize(
    "forget",
    [(3, 1), {1, 3}, range(1, 4, 2), np.array([1, 3]), [np.int64(3), np.int8(1)],
     torch.tensor([3, 1])],
    ids=repr,
)  # fmt: skip
def test_every_accepted_form_gives_the_same_result(forget: Any) -> None:
    assert same_bits(unlearn(tiny(), forget, **QUICK), unlearn(tiny(), FORGET, **QUICK))


def test_one_class_as_a_plain_int() -> None:
    assert_forgets(unlearn(tiny(), 2, **QUICK), [2])


# --- bad input: other arguments --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tail", "nowhere"), ("tail", ""), ("tail", 3.0), ("tail", None),
        ("objective", "best"), ("objective", None),
        ("impressions_per_class", 0), ("impressions_per_class", -1),
        ("impressions_per_class", True), ("space", "output"), ("space", None),
        ("impressions_per_class", 8.0), ("impressions_per_class", "8"),
        ("confidence", (0.9, 0.5)), ("confidence", (0, 0.5)), ("confidence", (0.5, 1.0)),
        ("confidence", 0.9), ("confidence", (0.5,)), ("confidence", ("a", "b")),
        ("max_steps", 0), ("max_steps", 1.5), ("restarts", -1),
        ("step_size", 0), ("step_size", 2), ("step_size", float("nan")), ("step_size", "fast"),
        ("inplace", 1), ("early_stop", "no"), ("progress", 1), ("callback", "f"), ("cache", 3),
        ("cache", "a\0b"), ("seed", 1 << 63), ("impressions", [1]), ("device", 10**30),
        ("objective", ["masked"]), ("space", ["input"]), ("precision", []), ("loop", {}),
        ("beta", -1), ("beta", float("nan")), ("beta", "none"),
        ("input_shape", (3, 8)), ("input_shape", (3, 9, 9)), ("mean", (1, 2)), ("std", 0),
        ("mixtures", -1), ("mixtures", 1.5), ("steps", 0), ("steps", True), ("batch", 0),
        ("learning_rate", 0), ("learning_rate", float("nan")), ("learning_rate", "slow"),
        ("weights", (0.9,)), ("weights", (0.9, -1)), ("weights", 0.9),
        ("weights", (float("nan"), 0.1)), ("weights", (float("inf"), 0.1)),
        ("margin", -1), ("margin", float("inf")), ("margin", "wide"),
        ("seed", -1), ("seed", 1.5), ("seed", True), ("device", "nonsense"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_refused_option_is_named(name: str, value: Any) -> None:
    model = tiny()
    with untouched(model), pytest.raises(ArgumentError) as caught:
        unlearn(model, FORGET, **(QUICK | {"inplace": True, name: value}))
    assert caught.value.argument == name
    shown = repr(value) if name != "tail" or value != "nowhere" else "nowhere"
    assert shown in str(caught.value)
    assert caught.value.remedy


def test_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="epochs"):
        unlearn(tiny(), FORGET, epochs=3)


# --- bad input: models -----------------------------------------------------------------------


def test_train_mode_comes_back_and_batchnorm_stands_still() -> None:
    model = tiny().train()
    model.drop.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    with untouched(model):
        result = unlearn(model, FORGET, **QUICK)
    assert {n: m.training for n, m in result.named_modules()} == modes
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert bits(getattr(result.bn, name)) == bits(getattr(model.bn, name))
    assert same_bits(result, unlearn(tiny(), FORGET, **QUICK))  # dropout plays no part either


@pytest.mark.parametrize("tail", ["auto", "conv"])
def test_batchnorm_statistics_inplace_and_inside_the_tail(tail: str) -> None:
    model = tiny().train()
    before = {n: bits(b) for n, b in model.named_buffers()}
    unlearn(model, FORGET, inplace=True, tail=tail, **QUICK)
    assert {n: bits(b) for n, b in model.named_buffers()} == before
    assert model.training
    assert model.bn.training


@pytest.mark.parametrize("inplace", [False, True])
def test_frozen_parameters_stay_frozen_and_still_forget(inplace: bool) -> None:
    model = tiny().requires_grad_(False)
    model.fc1.bias.requires_grad_(True)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    result = unlearn(model, FORGET, inplace=inplace, **QUICK)
    assert {n: p.requires_grad for n, p in result.named_parameters()} == flags
    assert all(p.grad is None for p in result.parameters())
    assert_forgets(result, FORGET)


def test_gradients_of_the_user_are_left_alone() -> None:
    model = tiny()
    model(tiny_data(10)[0]).sum().backward()
    before = {n: bits(p.grad) for n, p in model.named_parameters()}
    unlearn(model, FORGET, inplace=True, **QUICK)
    assert {n: bits(p.grad) for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("inplace", [False, True])
def test_nan_weights_are_refused(inplace: bool) -> None:
    model = tiny()
    with torch.no_grad():
        model.fc1.weight[3, 4] = float("nan")
    with untouched(model), pytest.raises(ModelError, match=r"fc1\.weight holds 1 NaN.* Load a"):
        unlearn(model, FORGET, inplace=inplace, **QUICK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
def test_other_dtypes_come_back_as_they_were(dtype: torch.dtype, inplace: bool) -> None:
    model = tiny().to(dtype)
    dtypes = {n: t.dtype for n, t in model.state_dict().items()}
    result = unlearn(model, FORGET, inplace=inplace, **QUICK)
    assert {n: t.dtype for n, t in result.state_dict().items()} == dtypes
    assert_forgets(result, FORGET)


@pytest.mark.shared
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lenet5_in_half_precision_forgets(dtype: torch.dtype, mnist: tuple[Tensor, Tensor]) -> None:
    model, forget = zoo.load("lenet5").to(dtype), [1, 2, 3, 4]
    result = unlearn(model, forget, **(QUICK | {"steps": 200}))
    measured = evaluate(result, (mnist[0][:2000], mnist[1][:2000]), forget)
    assert next(result.parameters()).dtype == dtype
    assert measured.forget_accuracy <= 1, str(measured)
    assert measured.retain_accuracy >= 97, str(measured)


OUTPUTS = {
    "tuple": lambda y: (y, 0 * y),
    "list": lambda y: [y],
    "dict": lambda y: {"loss": y.sum(), "logits": y},
    "object": Answer,
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_in_a_container(form: str) -> None:
    model = Returning(tiny(), OUTPUTS[form])
    with untouched(model):
        result = unlearn(model, FORGET, **QUICK)
    assert type(result(tiny_data(5)[0])) is type(OUTPUTS[form](torch.zeros(1, 5)))
    assert_forgets(result, FORGET)
    assert same_bits(result.inner, unlearn(tiny(), FORGET, **QUICK))


def test_a_tail_without_parameters() -> None:
    class Scaled(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(super().forward(x))

    model = Scaled().eval()
    match = "tail: 'out' is followed by no layer with parameters.*such as 'fc2'"
    with untouched(model), pytest.raises(ArgumentError, match=match):
        unlearn(model, FORGET, tail="out", **QUICK)


def test_a_model_without_parameters() -> None:
    with pytest.raises(ModelError, match="without parameters"):
        unlearn(nn.Flatten(), FORGET)


def test_a_model_for_one_image_at_a_time() -> None:
    class One(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise RuntimeError("one image at a time")
            return super().forward(x)

    model = One().eval()
    match = r"model: .*not a batch of two.*one image at a time.*any batch size"
    with untouched(model), pytest.raises(ModelError, match=match):
        unlearn(model, FORGET, input_shape=(3, 8, 8), **QUICK)


def test_one_image_at_a_time_without_a_shape() -> None:
    class One(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(1, 3, 8, 8))

    model = One().eval()
    with untouched(model), pytest.raises(ModelError, match="not a batch of two"):
        unlearn(model, FORGET, **QUICK)


def test_a_model_that_raises_for_the_inferred_shape() -> None:
    class Picky(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 9:
                raise RuntimeError("made for nine pixels")
            return super().forward(x[..., :8, :8])

    model = Picky().eval()
    match = r"input_shape: .*made for nine pixels.*Pass input_shape=\("
    with untouched(model), pytest.raises(ArgumentError, match=match):
        unlearn(model, FORGET, **QUICK)


def test_a_given_shape_at_which_the_model_raises() -> None:
    model = tiny()
    with untouched(model), pytest.raises(ArgumentError, match=r"input_shape: .*\(3, 32, 32\)"):
        unlearn(model, FORGET, input_shape=(3, 32, 32), **QUICK)


class TiedNet(nn.Module):
    """The last layer is also the first: one 16x16 matrix; a third layer may come behind."""

    def __init__(self, third: bool = False) -> None:
        super().__init__()
        self.first, self.final = nn.Linear(16, 16), nn.Linear(16, 16)
        self.final.weight = self.first.weight
        self.third = nn.Linear(16, 16) if third else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.final(F.relu(self.first(x.flatten(1))))
        return x if self.third is None else self.third(F.relu(x))


def tied_net(third: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model = TiedNet(third).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


TIED = QUICK | {"input_shape": (1, 4, 4), "impressions_per_class": 4}


@pytest.mark.parametrize("tail", ["auto", "last"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_auto_moves_ahead_of_weights_tied_to_the_head(tail: str) -> None:
    model = tied_net()
    runner = ZeroShotUnlearner(model, FORGET, tail=tail, **TIED)
    with untouched(model):
        result = runner.run()
    assert runner.split_point.name == "first"
    assert result.first.weight is result.final.weight
    assert changed_tensors(model, result) >= {"first.weight", "final.weight", "final.bias"}
    if tail == "last":
        assert "tied to the backbone" in runner.split_point.reason


def test_a_named_tail_tied_to_the_head_is_refused() -> None:
    model = tied_net()
    match = r"tail: 'final' would train first\.weight.*tied weights.*leave tail='auto'"
    with untouched(model), pytest.raises(ArgumentError, match=match):
        unlearn(model, FORGET, tail="final", **TIED)


def test_two_names_of_one_tensor_in_the_tail() -> None:
    model = tiny()
    model.again = model.fc2
    model.alias = model.fc2.weight
    result = unlearn(model, FORGET, tail="fc2", **QUICK)
    assert result.again is result.fc2
    assert result.alias is result.fc2.weight
    assert {"fc2.weight", "again.weight", "alias"} <= changed_tensors(model, result)
    assert_forgets(result, FORGET)


def test_functional_dropout_plays_no_part() -> None:
    class Functional(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.bn(self.conv(x))).flatten(1)
            return self.fc2(F.dropout(self.act(self.fc1(x)), 0.5, self.training))

    model = Functional().train()
    model.load_state_dict(tiny().state_dict())
    assert same_bits(unlearn(model, FORGET, **QUICK), unlearn(tiny(), FORGET, **QUICK))


def test_a_compiled_model() -> None:
    inner = tiny()
    model = torch.compile(inner, backend="eager")
    model(tiny_data(5)[0])
    with untouched(inner):
        result = unlearn(model, FORGET, **QUICK)
    assert type(result) is type(model)
    assert unwrap(result) is not inner
    assert same_bits(unwrap(result), unlearn(tiny(), FORGET, **QUICK))
    images = tiny_data()[0]
    assert torch.allclose(result(images), unwrap(result)(images), atol=1e-5)
    assert_forgets(result, FORGET)
    assert unlearn(model, FORGET, inplace=True, **QUICK) is model
    assert_forgets(model, FORGET)
    assert_forgets(inner, FORGET)


def test_a_data_parallel_model() -> None:
    where = "cuda" if torch.cuda.is_available() else "cpu"  # it runs on GPUs where there are any
    inner = tiny().to(where)
    model = nn.DataParallel(inner)
    with untouched(model):
        result = unlearn(model, FORGET, **QUICK)
    assert type(result) is nn.DataParallel
    assert result.module is not inner
    assert_forgets(result, FORGET)
    assert same_bits(result.module, unlearn(tiny().to(where), FORGET, **QUICK))
    assert unlearn(model, FORGET, inplace=True, **QUICK).module is inner
    assert_forgets(inner, FORGET)


def test_a_model_that_python_control_flow_keeps_from_tracing() -> None:
    class Branching(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.abs().sum() >= 0) else x

    model = Branching().eval()
    model.load_state_dict(tiny().state_dict())
    result = unlearn(model, FORGET, **QUICK)
    assert_forgets(result, FORGET)
    assert "forward" not in result.conv.__dict__


def test_a_class_that_the_model_never_answers_is_warned_of() -> None:
    model = tiny()
    with torch.no_grad():
        model.fc2.weight[4] = 0
        model.fc2.bias[4] = -1e4
    with pytest.warns(UserWarning, match="no impression reached its confidence for class 4"):
        result = unlearn(model, FORGET, **(QUICK | {"max_steps": 20, "restarts": 0}))
    assert all(p.isfinite().all() for p in result.parameters())


# --- interruptions ---------------------------------------------------------------------------


def interrupt_at(stage: str, call: int) -> Any:
    seen = {"synthesise": 0, "fit": 0}

    def callback(event: Event) -> None:
        seen[event.stage] += 1
        if event.stage == stage and seen[stage] == call:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize(("stage", "call"), [("synthesise", 1), ("synthesise", 5), ("fit", 1),
                                             ("fit", 7)])  # fmt: skip
def test_ctrl_c_in_a_stage_inplace(stage: str, call: int) -> None:
    model = tiny().train()
    with untouched(model), pytest.raises(KeyboardInterrupt):
        unlearn(model, FORGET, inplace=True, callback=interrupt_at(stage, call), **QUICK)


class _Interrupting(torch.Tensor):
    """Raises when it is copied somewhere."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            raise KeyboardInterrupt
        return super().__torch_function__(func, types, args, kwargs or {})


def test_ctrl_c_in_the_middle_of_replacing_parameters() -> None:
    model = tiny()
    values = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    values["fc1.weight"] = values["fc1.weight"].as_subclass(_Interrupting)
    assert next(iter(values)) != "fc1.weight"
    with untouched(model), pytest.raises(KeyboardInterrupt):
        replace_parameters(model, values)
    values["fc1.weight"] = torch.zeros_like(model.fc1.weight)
    replace_parameters(model, values)
    assert all(not p.any() for p in model.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_failure_after_the_weights_are_in(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    model = tiny()
    runner = ZeroShotUnlearner(model, FORGET, inplace=True, **QUICK)
    monkeypatch.setattr(zsu_fast.provenance.record.Record, "finish", fail)
    with untouched(model), pytest.raises(error):
        runner.run()


def test_warnings_as_errors_inplace() -> None:
    model = tiny()
    with torch.no_grad():
        model.fc2.weight[4] = 0
        model.fc2.bias[4] = -1e4
    options = QUICK | {"max_steps": 20, "restarts": 0, "tail": "fc1"}
    with warnings.catch_warnings(), untouched(model):
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="class 4"):
            unlearn(model, FORGET, inplace=True, mean=SPEC.mean, std=SPEC.std, **options)


def test_a_callback_error_comes_through() -> None:
    def callback(event: Event) -> None:
        if event.stage == "fit":
            raise ZeroDivisionError("mine")

    model = tiny()
    with untouched(model), pytest.raises(ZeroDivisionError, match="mine"):
        unlearn(model, FORGET, inplace=True, callback=callback, **QUICK)


def test_the_callback_ends_the_fit_and_keeps_the_best() -> None:
    seen: list[Event] = []

    def callback(event: Event) -> bool:
        seen.append(event)
        return event.stage == "fit" and len([e for e in seen if e.stage == "fit"]) == 20

    runner = ZeroShotUnlearner(tiny(), FORGET, callback=callback, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = runner.run()
    assert "callback asked to stop in fit" in runner.stopped
    assert seen[-1].stage == "fit"
    assert len([e for e in seen if e.stage == "fit"]) == 20
    assert runner.result.best is min(runner.history, key=lambda c: c.divergence)
    assert runner.result.learning_rate > 0
    assert not same_bits(result, tiny())


def test_the_callback_ends_synthesis_once_it_has_enough() -> None:
    def callback(event: Event) -> bool:
        return event.stage == "synthesise" and event.done >= 0.9 * event.total

    runner = ZeroShotUnlearner(tiny(), FORGET, callback=callback, **QUICK)
    result = runner.run()
    assert len(runner.impressions) < 40
    assert runner.impressions.hit.all()
    assert_forgets(result, FORGET)


def test_the_callback_ends_synthesis_with_too_little() -> None:
    model = tiny()
    with untouched(model), pytest.raises(zsu_fast.ZsuFastError, match="callback: it stopped"):
        unlearn(model, FORGET, inplace=True, callback=lambda _: True, **QUICK)


# --- the caller's modes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_modes_of_the_caller_play_no_part(mode: Any, inplace: bool) -> None:
    model, other = tiny(), tiny()
    with mode():
        result = unlearn(model, FORGET, inplace=inplace, **QUICK)
        made = synthesize(other, [0], per_class=4, progress=False)
        zsu_fast.split(other)
        enabled = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    with mode():
        assert enabled == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert same_bits(result, unlearn(tiny(), FORGET, **QUICK))
    assert not any(p.is_inference() for p in result.parameters())
    assert torch.equal(made.images, synthesize(tiny(), [0], per_class=4, progress=False).images)
    train(result, 2)


# --- the record ------------------------------------------------------------------------------


def test_the_record_of_a_run() -> None:
    model = tiny()
    runner = ZeroShotUnlearner(model, FORGET, seed=5, **QUICK)
    result = runner.run()
    told = json.loads(runner.record.to_json())
    assert told["weights_before"] == weights_hash(model)
    assert told["weights_after"] == weights_hash(result) != told["weights_before"]
    assert told["forget"] == FORGET
    assert told["settings"]["seed"] == 5
    assert told["split"]["at"] == runner.split_point.name
    assert told["fit"]["stopped"] == runner.stopped
    assert set(told["timings"]) == {"synthesise", "split", "fit", "total"}


def test_split_of_a_model(tmp_path: Any) -> None:
    del tmp_path
    model = tiny()
    images = tiny_data(20)[0]
    for at in ("auto", "last", "bn", "fc1"):
        with untouched(model):
            cut = zsu_fast.split(model, at)
        assert torch.allclose(cut.tail(*cut.backbone(images)), model(images), atol=1e-4)
    with pytest.raises(ArgumentError, match="tail: got 'nowhere'"):
        zsu_fast.split(model, "nowhere")


def test_training_still_works_on_the_result() -> None:
    result = unlearn(tiny(), FORGET, **QUICK)
    assert evaluate(train(result, 60), tiny_data(), FORGET).overall_accuracy > 90


def test_the_callers_default_dtype_changes_nothing() -> None:
    want = zsu_fast.unlearn(tiny(), [1, 3], **QUICK)
    torch.set_default_dtype(torch.float64)
    try:
        got = zsu_fast.unlearn(tiny(), [1, 3], **QUICK)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(got, want)
