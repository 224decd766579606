"""The rows of deep forgetting: scenes, rows inverted to every class, and their cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_case import CPU, row_source
from support import FEW_ROWS, SPEC, bits, deep_run, same_bits, tiny
from torch import Tensor, nn

from zsu_fast import ClassImpressions, ZeroShotUnlearner
from zsu_fast.errors import UnlearningWarning
from zsu_fast.runtime.progress import Event, Reporter
from zsu_fast.training.deep import row_ascent, rows as rows_module, settings as settings_module
from zsu_fast.training.deep.deep import DeepRows
from zsu_fast.training.deep.rows import RowSource
from zsu_fast.training.deep.settings import DeepSettings
from zsu_fast.training.deep.tail import FrozenClassifierTail

COLUMNS = ("images", "labels", "confidence", "target", "steps", "hit")


class Normed(nn.Module):
    """The layer that is trained, ``inner``, takes what BatchNorm gives, without an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.inner, self.last = nn.Linear(72, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.bn.weight.uniform_(0.5, 2)
            self.bn.bias.uniform_(-2, 2)
            self.bn.running_mean.fill_(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.bn(self.conv(x)).flatten(1)).relu())


def norm_of(source: RowSource) -> nn.BatchNorm2d:
    (norm,) = (m for m in source.model.modules() if isinstance(m, nn.BatchNorm2d))
    return norm


def state(norm: nn.Module) -> dict[str, Any]:
    modes = {name: module.training for name, module in norm.named_modules()}
    return {name: bits(b) for name, b in norm.named_buffers()} | modes


# --- scenes ----------------------------------------------------------------------------------


def test_half_of_the_scenes_have_the_moments_that_batchnorm_asks_for() -> None:
    source = row_source(Normed().eval())
    (features,) = source.scenes.features
    norm, half = norm_of(source), len(features) // 2
    channels = features.view(len(features), 8, 9)
    for part, near in ((channels[:half], True), (channels[half:], False)):
        mean = part.mean((0, 2))
        deviation = part.transpose(0, 1).flatten(1).std(1, correction=0)
        assert torch.allclose(mean, norm.bias, atol=0.02) is near
        assert torch.allclose(deviation, norm.weight, rtol=0.02) is near
    starts = source.scenes.starts  # inverted rows start from those alone
    assert len(starts) == half


def test_the_recorded_statistics_stay_to_the_bit() -> None:
    source = row_source(Normed().eval())
    before = state(norm_of(source))
    assert len(source.scenes.starts) == 256
    assert state(norm_of(source)) == before


def test_the_recorded_statistics_stay_if_drawing_fails() -> None:
    source = row_source(Normed().eval())
    norm = norm_of(source)
    before, seen = state(norm), []

    def fail(module: nn.Module, _args: Any, _output: Any) -> None:
        if module.training:
            seen.append(state(norm))
            raise KeyboardInterrupt

    norm.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        _ = source.scenes
    assert seen != [before]  # there was something to restore
    assert state(norm) == before


def test_without_batchnorm_every_scene_is_a_start() -> None:
    model = tiny()
    model.bn = nn.Identity()
    scenes = row_source(model).scenes
    assert len(scenes.starts) == len(scenes.features[0]) == 512


def test_scenes_are_valid_images_of_their_seed() -> None:
    source = row_source()  # inverted at the image itself
    assert source.deep.early.name == "conv"
    starts = source.scenes.starts.view(-1, *SPEC.shape)
    low, high = SPEC.low.view(3, 1, 1), SPEC.high.view(3, 1, 1)
    assert bool(((starts >= low - 1e-5) & (starts <= high + 1e-5)).all())
    assert float((starts == low).float().mean()) > 0.02  # some contrasts are stretched
    assert torch.equal(row_source().scenes.starts, source.scenes.starts)
    assert not torch.equal(row_source(seed=1).scenes.starts, source.scenes.starts)


def test_rows_that_cost_much_are_fewer() -> None:
    settings, gpu = DeepSettings(), torch.device("cuda")
    small, large = 32 * 32, 128 * 128  # pixels
    assert settings.scenes_for(small, 4096, 10, 4_000_000, CPU) == 5120
    assert settings.scenes_for(large, 4096, 10, 4_000_000, CPU) == 2560
    assert settings.scenes_for(small, 4096, 10, 600_000_000, CPU) == 1536  # a multiple of 512
    assert settings.scenes_for(small, 4096, 10, 1_000_000_000, gpu) == 5120
    assert settings.scenes_for(small, 2**16, 10, 1, gpu) == 1024  # 64 million values
    assert settings.scenes_for(small, 1, 2**16, 1, gpu) == 1024
    assert settings.scenes_for(large, 1, 10, 10**12, CPU) == 512
    assert settings.scenes_for(large, 10**7, 10, 10**12, CPU) == 256
    assert settings.inverted_for(4096, 10, 4_000_000, CPU) == 1024
    assert settings.inverted_for(4096, 1000, 4_000_000, CPU) == 7200
    assert settings.for_strangers(1000).inverted_for(4096, 1000, 4_000_000, CPU) == 1800
    assert settings.inverted_for(4096, 1000, 10**12, CPU) == 256
    assert settings.schedule_for(4_000_000, CPU) == (200, 224)
    assert settings.schedule_for(10**9, CPU) == (100, 64)
    assert settings.schedule_for(10**9, gpu) == (200, 224)


# --- inverted rows ---------------------------------------------------------------------------


def test_inverted_rows_reach_their_confidence() -> None:
    source = row_source()
    made = source.invert(range(5), Reporter(False, None))
    assert made.space == "tail-input"
    assert made.hit_rate > 0.95
    with torch.no_grad():
        own = source.deep.flat(made.images).softmax(1).gather(1, made.labels[:, None])[:, 0]
    assert torch.allclose(own, made.confidence, atol=1e-4)
    assert torch.equal(made.hit, made.confidence >= made.target)
    assert float(made.target.min()) >= 0.3
    assert float(made.target.max()) <= 0.99
    assert int(made.steps.max()) <= FEW_ROWS.ascent_steps
    assert bool((made.confidence[made.steps == 0] >= made.target[made.steps == 0]).all())
    assert 0.2 < float((made.steps > 0).float().mean()) < 0.8


@pytest.mark.parametrize("hopeless", [False, True])
def test_a_quarter_of_the_rows_show_whether_they_are_hopeless(
    hopeless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_CHUNK", 64)
    monkeypatch.setattr(rows_module, "_CONFIDENCE", (0.0, 1e-9))  # which all reach
    source = row_source(inverted=64, inverted_per_class=80)  # 400
    source.cache, seen = tmp_path, []

    def is_hopeless(rows: ClassImpressions) -> bool:
        seen.append(len(rows))
        return hopeless

    made = source.invert(range(5), Reporter(False, None), is_hopeless)
    assert len(made) == (128 if hopeless else 400)
    assert seen == [128]
    source.invert(range(5), Reporter(False, None), is_hopeless)
    assert seen == ([128, 128] if hopeless else [128])  # a few rows must not be cached
    few = row_source(inverted=256)
    few.invert(range(5), Reporter(False, None), is_hopeless)
    assert len(seen) == 1 + hopeless  # the first quarter were all


def test_rows_that_have_arrived_are_computed_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_ascent, "_FEWEST_ROWS", 4)
    run, sizes = row_ascent.RowAscent._logits_and_distance, []

    def noted(ascent: Any, points: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(points))
        return run(ascent, points)

    monkeypatch.setattr(row_ascent.RowAscent, "_logits_and_distance", noted)
    source = row_source(ascent_steps=14)
    made = source.invert(range(5), Reporter(False, None))
    assert made.hit_rate > 0.95
    assert max(sizes) == 128
    assert min(sizes) < 64
    assert sum(sizes) < 0.7 * 128 * len(sizes)
    with torch.no_grad():  # what is recorded of each row is of where that row ended
        own = source.deep.flat(made.images).softmax(1).gather(1, made.labels[:, None])[:, 0]
    assert torch.allclose(own, made.confidence, atol=1e-4)
    assert bool((made.hit | (made.steps == 14)).all())


def test_inverted_images_are_valid_images() -> None:
    made = row_source().invert(range(5), Reporter(False, None))
    images = made.images.view(-1, *SPEC.shape)
    low, high = SPEC.low.view(3, 1, 1), SPEC.high.view(3, 1, 1)
    assert bool(((images >= low - 1e-5) & (images <= high + 1e-5)).all())


def test_inverted_activations_are_not_negative_after_a_relu() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(),
        nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip
    source = row_source(model.eval())
    assert source.deep.early.name == "3"
    made = source.invert(range(5), Reporter(False, None))
    assert float(made.images.min()) == 0
    assert float(made.images.max()) > 0


def test_batch_statistics_are_near_the_recorded_ones() -> None:
    """Weighed less, the ascent goes further from what the model saw in its training."""

    def distance(weight: float) -> float:
        source = row_source(statistics=weight)
        points = source.invert(range(5), Reporter(False, None)).images
        norm, features = norm_of(source), source.deep.early.backbone
        with torch.no_grad():
            x = source.model.module.conv(points.view(-1, *SPEC.shape))
        assert features is not None
        return float((x.mean((0, 2, 3)) - norm.running_mean).square().sum())

    assert distance(30.0) < 0.8 * distance(0.0)


def test_a_third_of_the_rows_are_of_forgotten_classes() -> None:
    """... and two thirds are spread over all classes."""
    labels = row_source(forget=[2]).invert(range(5), Reporter(False, None)).labels
    assert torch.bincount(labels).tolist() == [35, 34, 85 + 34, 34, 34]
    some = row_source(forget=[2]).invert([0, 2, 4], Reporter(False, None)).labels
    assert torch.bincount(some, minlength=5).tolist() == [57, 0, 85 + 57, 0, 57]
    halves = torch.stack([torch.bincount(h, minlength=5) for h in labels.split(128)])
    assert bool((halves >= 10).all())  # in random order


def test_rows_for_training_and_for_validation_are_all_rows_and_no_copies() -> None:
    source = row_source()
    made = source.invert(range(5), Reporter(False, None))
    with torch.no_grad():
        inverted = source.deep.features(made.images)
    tail = FrozenClassifierTail(source.model, source.deep)
    data = DeepRows.label(tail, source.scenes.features, inverted, made.labels, source.forget)
    train, held = data.split()
    assert len(train) + len(held) == len(source.scenes.features[0]) + len(made)
    assert train.features[0].data_ptr() == data.rows.features[0].data_ptr()
    scenes, wanted = source.scenes.features[0], inverted[0]
    for part, places in ((train, data.order[: len(train)]), (held, data.order[len(train) :])):
        assert part.scene is not None
        drawn = places < len(scenes)
        assert torch.equal(part.scene > 0, drawn)
        assert torch.equal(part.features[0][drawn], scenes[places[drawn]])
        assert torch.equal(part.features[0][~drawn], wanted[places[~drawn] - len(scenes)])
        assert torch.equal(part.label[~drawn], made.labels[places[~drawn] - len(scenes)])
        assert 0.1 < float(drawn.float().mean()) < 0.9
    logits = source.deep.flat(made.images).detach()
    assert torch.allclose(data.teacher[-len(made) :], logits, atol=1e-5)
    every = torch.cat([train.label, held.label])
    assert torch.equal(every, data.rows.label)


def test_rows_of_a_class_start_from_different_scenes() -> None:
    source = row_source()
    made = source.invert(range(5), Reporter(False, None))
    untouched = row_source(ascent_steps=1, ascent_step=1e-9)
    starts = untouched.invert(range(5), Reporter(False, None))
    for label in range(5):
        own = starts.images[made.labels == label]
        assert len(own.unique(dim=0)) > 0.9 * len(own)  # some scenes are black and white alike
        with torch.no_grad():
            logits = source.deep.flat(source.scenes.starts).log_softmax(1)[:, label]
            theirs = source.deep.flat(own).log_softmax(1)[:, label]
        assert float(theirs.min()) >= float(logits.topk(len(own)).values.min()) - 1e-4


def wide(classes: int) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(16, classes)).eval()


def test_many_classes_have_several_rows_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_CONFIDENCE", (0.0, 1e-9))
    made = row_source(wide(600), [7]).invert(range(600), Reporter(False, None))
    counts = torch.bincount(made.labels, minlength=600)
    assert len(made) == 4320
    assert int(counts[7]) == 1440 + 5
    assert int(counts.min()) == 4
    assert int(counts.sum() - counts[7]) == 2880 - 5


@pytest.mark.parametrize("arrives", [True, False])
def test_fewer_rows_are_drawn_if_they_never_arrive(
    arrives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arrives:
        monkeypatch.setattr(rows_module, "_CONFIDENCE", (0.0, 1e-9))
    source = row_source(wide(600), [7])
    source.cache = tmp_path
    made = source.invert(range(600), Reporter(False, None))
    assert bool((made.labels == 7).any())
    assert (made.hit_rate > 0.5) is arrives
    assert (len(made) == 4320) is arrives
    assert len(made) >= 1080
    again = source.invert(range(600), Reporter(False, None))  # from the cache
    assert torch.equal(made.images, again.images)


def test_rows_are_as_many_per_class_as_asked_for() -> None:
    run = ZeroShotUnlearner(wide(600), [7], impressions_per_class=2, input_shape=SPEC.shape)
    settings = run.options.deep_settings(run.work, 600, 600, 1)
    assert settings.inverted_for(100, 600, 1, CPU) == 1200


def test_each_forgotten_class_has_a_row_however_few_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings_module, "_ASCENT_WORK", 1.0)
    forget = list(range(100, 400))
    made = row_source(wide(600), forget).invert(range(600), Reporter(False, None))
    counts = torch.bincount(made.labels, minlength=600)
    assert int(counts[forget].min()) >= 1
    assert bool((counts[:100] > 0).any())  # retained classes too


def test_a_stop_keeps_the_rows_so_far() -> None:
    events: list[Event] = []
    made = row_source().invert(range(5), Reporter(False, lambda e: events.append(e) or True))
    assert [(e.done, e.total) for e in events] == [(128, 256)]
    assert len(made) == 128
    whole = row_source().invert(range(5), Reporter(False, None))
    for name in COLUMNS:
        assert bits(getattr(made, name)) == bits(getattr(whole, name)[:128])


def test_vectors_have_rows_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    run, _ = deep_run(model, [2], input_shape=(12,), mean=0.5, std=0.25)
    assert run.record.depth["level"] == "deep"
    assert set(run.record.split["trained"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert run.record.depth["unmask_leak"]["after"] < run.record.depth["unmask_leak"]["before"]


# --- cache -----------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every chunk of scenes and every chunk of inverted rows that is made."""
    made: list[str] = []
    chunks, run = rows_module.dead_leaves_chunks, row_ascent.RowAscent.run

    def noted_chunks(*arguments: Any) -> Iterator[Tensor]:
        for chunk in chunks(*arguments):
            made.append("scenes")
            yield chunk

    def noted_run(self: Any, *arguments: Any) -> Any:
        made.append("inverted")
        return run(self, *arguments)

    monkeypatch.setattr(rows_module, "dead_leaves_chunks", noted_chunks)
    monkeypatch.setattr(row_ascent.RowAscent, "run", noted_run)
    return made


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_a_second_run_takes_its_rows_from_the_cache(tmp_path: Path, drawn: list[str]) -> None:
    plain = deep_run()[1]
    assert set(drawn) == {"scenes", "inverted"}
    first = deep_run(cache=tmp_path)[1]
    assert len(files(tmp_path)) == 2
    drawn.clear()
    second = deep_run(cache=tmp_path)[1]
    assert drawn == []
    assert same_bits(first, plain)
    assert same_bits(second, plain)


@pytest.mark.parametrize(
    ("options", "again"),
    [({"seed": 1}, {"scenes", "inverted"}), ({"forget": [2]}, {"inverted"}),
     ({"settings": replace(FEW_ROWS, ascent_steps=14)},
      {"scenes", "inverted"})],
    ids=["seed", "forget", "settings"],
)  # fmt: skip
def test_other_runs_do_not_find_them(
    tmp_path: Path, drawn: list[str], options: dict[str, Any], again: set[str]
) -> None:
    deep_run(cache=tmp_path)
    drawn.clear()
    other = deep_run(cache=tmp_path, **options)[1]
    assert set(drawn) == again
    assert same_bits(other, deep_run(**options)[1])


def test_another_models_rows_are_not_found(tmp_path: Path, drawn: list[str]) -> None:
    deep_run(cache=tmp_path)
    model = tiny()
    with torch.no_grad():
        model.fc2.bias[0] += 0.1
    drawn.clear()
    deep_run(model, cache=tmp_path)
    assert set(drawn) == {"scenes", "inverted"}


@pytest.mark.parametrize("kept", [0, 100])
def test_damaged_files_are_made_anew(tmp_path: Path, drawn: list[str], kept: int) -> None:
    first = deep_run(cache=tmp_path)[1]
    for file in files(tmp_path):
        file.write_bytes(file.read_bytes()[:kept])
    drawn.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second = deep_run(cache=tmp_path)[1]
    assert len([w for w in caught if "made anew" in str(w.message)]) == 2
    assert all(issubclass(w.category, UnlearningWarning) for w in caught)
    assert set(drawn) == {"scenes", "inverted"}
    drawn.clear()
    third = deep_run(cache=tmp_path)[1]
    assert drawn == []
    assert same_bits(second, first)
    assert same_bits(third, first)


def test_an_interrupted_inversion_is_not_stored(tmp_path: Path, drawn: list[str]) -> None:
    deep_run(cache=tmp_path, callback=lambda event: event.stage == "synthesise")
    assert len(files(tmp_path)) == 1
    drawn.clear()
    whole = deep_run(cache=tmp_path)[1]
    assert set(drawn) == {"inverted"}
    assert same_bits(whole, deep_run()[1])
