"""Very many classes: which get impressions, and that nothing grows with rows times classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import QUICK, SPEC, assert_forgets, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zsu_fast
from zsu_fast import ZeroShotUnlearner
from zsu_fast.errors import ArgumentError
from zsu_fast.synthesis import class_sampling as sampling
from zsu_fast.synthesis.ascent_settings import BatchLimits
from zsu_fast.synthesis.synthesize import batch_rows
from zsu_fast.training.class_subset import ClassSubsetTail, supports_subset
from zsu_fast.training.features import FeatureSet
from zsu_fast.training.limits import MemoryLimits
from zsu_fast.training.losses import ForgetOnlyKL, MaskedKL
from zsu_fast.training.teacher import Teacher, build_feature_set

CLASSES, FEATURES, ROWS = 40, 12, 30
GONE = [3, 17, 39]


class Many(nn.Module):
    """float [N, 3, 8, 8] -> [N, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
        self.fc = nn.Linear(16, classes)
        self.input_spec = SPEC
        nn.init.normal_(self.trunk[1].weight, std=0.1)
        nn.init.normal_(self.fc.weight, std=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x))


def forget_mask() -> Tensor:
    mask = torch.zeros(CLASSES, dtype=torch.bool)
    mask[GONE] = True
    return mask


def rows_of(tail: nn.Module, names: list[str], **limits: int) -> FeatureSet:
    """Mixtures of random features, labelled by ``tail``; the same at each call."""
    features = torch.rand(ROWS, FEATURES, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        label = tail(features).argmax(1)
    draw = torch.Generator().manual_seed(1)
    teacher = Teacher(tail, forget_mask(), names, MemoryLimits(**limits))
    return build_feature_set(teacher, (features,), label, 200, draw)


# --- which classes ---------------------------------------------------------------------------


def test_a_sample_has_the_forgotten_the_nearest_and_some_by_lot() -> None:
    weight = torch.randn(200, 64)
    for near, gone in ((50, 3), (51, 4), (52, 3)):
        weight[near] = 3 * weight[gone] + 0.01 * torch.randn(64)  # by direction, not by length
    retained = [c for c in range(200) if c not in (3, 4)]
    chosen = sampling.sample_classes(weight, [3, 4], retained, 6, seed=0)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 8
    assert {3, 4, 50, 51, 52} <= set(chosen)
    assert chosen == sampling.sample_classes(weight, [3, 4], retained, 6, seed=0)
    assert chosen != sampling.sample_classes(weight, [3, 4], retained, 6, seed=1)


def test_nearness_is_the_same_in_tiles() -> None:
    weight, others = torch.randn(50, 8, 2, 2), torch.arange(5, 50)
    want = sampling.nearness(weight, [0, 1], others)
    tiled = sampling.nearness(weight, [0, 1], others, tile_values=100)
    torch.testing.assert_close(tiled, want)
    flat = weight.flatten(1) - weight.flatten(1).mean(0)
    cosines = nn.functional.cosine_similarity(flat[others][:, None], flat[None, :2], dim=2)
    torch.testing.assert_close(want, cosines.amax(1))


def test_a_sample_as_large_as_all_is_all() -> None:
    assert sampling.sample_classes(None, [1], [0, 2, 3], 3, seed=0) == [0, 1, 2, 3]


def test_only_very_many_classes_are_sampled_by_default() -> None:
    assert sampling.sample_size(4096, None) == 4096
    assert sampling.sample_size(4097, None) == 1024
    assert sampling.sample_size(100_000, 2000) == 2000
    assert sampling.sample_size(5, 2000) == 5


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "8"])
def test_a_bad_sample_size_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="retain_sample"):
        ZeroShotUnlearner(tiny(), [0], retain_sample=value)


def test_a_run_makes_impressions_of_the_sample_alone_and_says_so() -> None:
    run = ZeroShotUnlearner(tiny(), [1], retain_sample=2, input_shape=(3, 8, 8), **QUICK)
    result = run.run()
    assert run.impressions is not None
    made = run.impressions.labels.unique().tolist()
    assert 1 in made
    assert len(made) == 3
    told = run.record.impressions
    assert told["classes"] == 3
    assert told["rule"] == sampling.NEAREST
    assert not [note for note in run.record.warnings if "no impression reached" in note]
    assert_forgets(result, [1])
    whole = ZeroShotUnlearner(tiny(), [1], input_shape=(3, 8, 8), **QUICK)
    assert whole.active_classes == [0, 1, 2, 3, 4]
    assert whole.sampled == sampling.ALL


def test_without_weights_a_class_the_sample_is_by_lot_and_says_so() -> None:
    class Summed(nn.Module):  # two layers' halves of the logits
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(192, 3), nn.Linear(192, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x.flatten(1)), self.two(x.flatten(1))], 1)

    run = ZeroShotUnlearner(Summed(), [5], retain_sample=2, input_shape=(3, 8, 8), progress=False)
    assert len(run.active_classes) == 3
    assert run.sampled == sampling.RANDOM


def test_impressions_given_with_a_sample_need_the_forgotten_and_one_more() -> None:
    made = zsu_fast.synthesize(
        tiny(), classes=[0, 1], per_class=8, input_shape=(3, 8, 8), progress=False
    )
    options: dict[str, Any] = {"impressions": made, "input_shape": (3, 8, 8), **QUICK}
    assert_forgets(ZeroShotUnlearner(tiny(), [1], retain_sample=2, **options).run(), [1])
    for forget, sample in (([1], None), ([2], 2), ([0, 1], 2)):
        with pytest.raises(ArgumentError, match="impressions"):
            ZeroShotUnlearner(tiny(), forget, retain_sample=sample, **options)


# --- the forgotten logits alone --------------------------------------------------------------


@pytest.mark.parametrize("rows", [torch.tensor([3, 17, 39]), slice(10, 30)], ids=str)
def test_a_narrow_tail_gives_the_whole_tail_s_columns(rows: Any) -> None:
    tail, x = nn.Linear(FEATURES, CLASSES), torch.randn(5, FEATURES)
    few = ClassSubsetTail(tail, ["weight", "bias"], rows, trainable=True)
    torch.testing.assert_close(few(x), tail(x)[:, rows])
    assert [len(p) for p in few.parameters()] == [len(torch.arange(CLASSES)[rows])] * 2


def test_rows_are_written_back_and_no_others() -> None:
    tail = nn.Linear(FEATURES, CLASSES)
    before = tail.weight.detach().clone()
    few = ClassSubsetTail(tail, ["weight", "bias"], torch.tensor(GONE), trainable=True)
    with torch.no_grad():
        for parameter in few.parameters():
            parameter.add_(1)
    assert torch.equal(tail.weight, before)
    few.write_back()
    assert torch.equal(tail.weight[GONE], before[GONE] + 1)
    assert torch.equal(tail.weight[~forget_mask()], before[~forget_mask()])


class Pooled(nn.Module):
    """A convolution to classes, then a mean: as in SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(1)


class Reshaped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, CLASSES)


@pytest.mark.parametrize(
    ("tail", "x", "can"),
    [
        (nn.Linear(FEATURES, CLASSES), torch.randn(5, FEATURES), True),
        (Pooled(), torch.randn(5, 4, 3, 3), True),
        (Normalised(FEATURES, CLASSES), torch.randn(5, FEATURES), False),
        (Reshaped(FEATURES, CLASSES), torch.randn(5, FEATURES), False),
    ],
    ids=["linear", "pooled convolution", "log-softmax", "view"],
)
def test_only_logits_that_do_not_depend_on_others_are_narrowed(
    tail: nn.Module, x: Tensor, can: bool
) -> None:
    assert supports_subset(tail, list(tail.parameters()), (x,)) == can


def test_alone_is_the_masked_objective_in_two_numbers_a_row() -> None:
    tail, student = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
    with torch.no_grad():  # the student: other forgotten logits
        for parameter in (tail.weight, tail.bias):
            parameter.mul_(5)
        student.load_state_dict(tail.state_dict())
        student.weight[GONE] += torch.randn(3, FEATURES)
    whole, few = rows_of(tail, []), rows_of(tail, ["weight", "bias"])
    assert torch.equal(whole.label, few.label)
    assert torch.equal(whole.forgotten, few.forgotten)
    assert few.teacher.numel() == 0
    assert few.logit_std == pytest.approx(float(whole.teacher.std()), rel=1e-3)
    masked, alone = (
        MaskedKL(forget_mask(), 1.5, forget_logits_only=True),
        ForgetOnlyKL(forget_mask(), 1.5),
    )
    index = torch.arange(len(whole))
    with torch.no_grad():
        logits = student(*whole.features)
    loss, gradient = masked(logits, whole.select(index))
    narrowed, small = alone(logits[:, GONE].contiguous(), few.select(index))
    torch.testing.assert_close(narrowed, loss)
    torch.testing.assert_close(small, gradient[:, GONE], rtol=1e-4, atol=1e-8)
    assert not gradient[:, ~forget_mask()].any()
    own = ClassSubsetTail(student, ["weight", "bias"], torch.tensor(GONE), trainable=True)
    score = masked.score(student, whole)
    assert 0 < score[1] < 1
    assert alone.score(own, few) == pytest.approx(score, rel=1e-4)


def test_tiles_of_classes_say_what_all_of_them_do() -> None:
    tail = nn.Linear(FEATURES, CLASSES)
    want = rows_of(tail, ["weight", "bias"])
    got = rows_of(tail, ["weight", "bias"], tile_classes=7, tile_logits=70)
    assert torch.equal(got.label, want.label)
    assert got.retained is not None
    assert want.retained is not None
    torch.testing.assert_close(got.retained.logsumexp, want.retained.logsumexp)
    torch.testing.assert_close(got.retained.max, want.retained.max)
    retained = tail(*want.features)[:, ~forget_mask()]
    torch.testing.assert_close(want.retained.logsumexp, retained.logsumexp(1))
    torch.testing.assert_close(want.retained.max, retained.amax(1))
    assert got.logit_std == pytest.approx(want.logit_std, rel=1e-4)


def test_teacher_logits_too_large_to_store_are_computed_again() -> None:
    tail = nn.Linear(FEATURES, CLASSES)
    kept = rows_of(tail, [])
    asked = rows_of(tail, [], teacher_bytes=0, tile_logits=3 * CLASSES)
    assert asked.teacher.numel() == 0
    masked = MaskedKL(forget_mask(), 1.0)
    score = masked.score(tail, kept)
    index = torch.tensor([5, 200, 0])
    want = kept.select(index).teacher
    with torch.no_grad():
        tail.weight.mul_(-1)  # the teacher is the tail as it was
    torch.testing.assert_close(asked.select(index).teacher, want)
    assert torch.equal(asked.label, kept.label)
    with torch.no_grad():
        tail.weight.mul_(-1)
    assert masked.score(tail, asked) == pytest.approx(score, rel=1e-5)


def limited(forget: list[int], limits: MemoryLimits, **options: Any) -> ZeroShotUnlearner:
    """A run of the tiny model with other memory limits."""
    run = ZeroShotUnlearner(tiny(), forget, **QUICK | {"tail": "last"} | options)
    run.options.features = replace(run.options.features, limits=limits)
    return run


def test_a_fit_of_the_forgotten_logits_ends_where_one_of_all_does() -> None:
    options: dict[str, Any] = {"learning_rate": 1e-2, "input_shape": (3, 8, 8)}
    whole = limited([1, 4], MemoryLimits(subset_above=10**9), **options).run()
    few = limited([1, 4], MemoryLimits(subset_above=1), **options).run()
    assert_forgets(few, [1, 4])
    before = tiny().get_parameter("fc2.weight")
    got, want = few.get_parameter("fc2.weight"), whole.get_parameter("fc2.weight")
    assert torch.equal(got[[0, 2, 3]], before[[0, 2, 3]])
    moved = (want - before)[[1, 4]]
    assert float((got - want)[[1, 4]].norm() / moved.norm()) < 0.02


@pytest.mark.parametrize("options", [{"objective": "differential"}, {"tail": 2}], ids=str)
def test_other_fits_train_all_logits_and_need_no_stored_teacher(options: Any) -> None:
    options = {"learning_rate": 1e-3, "input_shape": (3, 8, 8)} | options
    want = limited([1], MemoryLimits(subset_above=1), **options).run()
    got = limited([1], MemoryLimits(subset_above=1, teacher_bytes=0), **options).run()
    retained = [0, 2, 3, 4]
    for model in (want, got):  # a fit of the forgotten logits alone would leave these as they are
        assert not torch.equal(
            model.get_parameter("fc2.weight")[retained],
            tiny().get_parameter("fc2.weight")[retained],
        )
    before = tiny().get_parameter("fc2.weight")
    moved = want.get_parameter("fc2.weight") - before
    off = got.get_parameter("fc2.weight") - want.get_parameter("fc2.weight")
    assert float(moved.norm()) > 0.1
    assert float(off.norm() / moved.norm()) < 0.02


# --- memory ----------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns, weights aside."""

    def __init__(self, weights: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights, self.most = weights, 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor) and tuple(item.shape) not in self.weights:
                self.most = max(self.most, item.numel())
        return out


@pytest.mark.parametrize("narrowed", [True, False])
def test_no_tensor_has_rows_times_classes(monkeypatch: pytest.MonkeyPatch, narrowed: bool) -> None:
    classes = 3000
    model = Many(classes).eval()
    run = ZeroShotUnlearner(
        model, [7, 8], retain_sample=30, impressions_per_class=4, mixtures=1000, steps=5, batch=16,
        max_steps=30, restarts=0, precision="float32", progress=False, tail="last",
    )  # fmt: skip
    limits = MemoryLimits(
        tile_logits=32 * classes, tile_classes=1000, teacher_bytes=0,
        subset_above=256 if narrowed else 10**9,
    )  # fmt: skip
    run.options.features = replace(run.options.features, limits=limits)
    run.options.ascent = replace(run.options.ascent, limits=BatchLimits(logits=16 * classes))
    weights = {tuple(p.shape) for p in model.parameters()} | {(16, classes)}
    with Largest(weights) as seen:
        run.synthesise()
        run.split()
        run.fit()
    assert len(run.active_classes) == 32
    assert seen.most <= 32 * classes  # a tile; 128 impressions alone would take four times that
    assert run.result is not None
    assert run.result.history[-1].step == 5


def test_few_rows_ascend_at_once_where_classes_are_many() -> None:
    run = ZeroShotUnlearner(Many(64), [0], progress=False)
    from zsu_fast.synthesis.space import input_space

    space = input_space(run.work, run.spec, "float32")
    wide = batch_rows(space)[1]
    assert wide > 20
    assert batch_rows(space, BatchLimits(logits=20 * 64)) == (80, 20)


def test_few_rows_ascend_at_once_where_they_fill_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ZeroShotUnlearner(Many(64), [0], progress=False)
    from zsu_fast.synthesis.space import input_space

    space = input_space(run.work, run.spec, "float32")
    weights = sum(p.nbytes for p in run.work.module.parameters())
    for row, cache, rows in (
        (weights // 12, 30 * (weights // 12), 30),
        (weights // 12, 0, 12),  # no less than the weights that are read for them
        (weights, 0, 8),
    ):
        monkeypatch.setattr("zsu_fast.runtime.memory.bytes_per_row", lambda *_, row=row: row)
        assert batch_rows(space, BatchLimits(cache_bytes=cache))[1] == rows
