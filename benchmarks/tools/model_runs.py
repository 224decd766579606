"""Runs a model of the table: unlearned, checked on images, saved, loaded and exported."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zsu_fast
from benchmarks.tools.model_cases import CLASSES, Case
from benchmarks.tools.model_rows import (
    FEW,
    FORGET,
    IMAGES,
    KEPT,
    MEAN,
    MOST_BACK,
    STD,
    Result,
    Row,
)
from zsu_fast.models import checkpoint
from zsu_fast.models.outputs import pick_logits
from zsu_fast.synthesis.dead_leaves import sample_dead_leaves

_OPTIONS: dict[str, Any] = {"mean": MEAN, "std": STD, "progress": False}


def images_of(case: Case, count: int, seed: int) -> Tensor:
    """Normalised dead-leaves images, float32 [count, 3, side, side]."""
    return (sample_dead_leaves(count, (3, case.side, case.side), seed) - MEAN) / STD


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Images [N, ...] -> logits [N, CLASSES], 64 images at a time."""
    return torch.cat([pick_logits(model(part)) for part in images.split(64)]).float()


@torch.no_grad()
def spread(model: nn.Module, images: Tensor) -> None:
    """Gives a random model statistics and a last layer with which each class is some answer.

    BatchNorm layers take the statistics of ``images``. The last layers, whose rows are the classes,
    are multiplied by the matrix that makes their outputs uncorrelated, of equal variance 4; where
    a model starts with zeros there, they are drawn at random first.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for part in images.split(64) if norms else ():
        model(part)
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()
    heads = [m for m in model.modules() if _is_head(m)]
    for head in heads:
        if not head.weight.any():
            nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    seen: dict[nn.Module, list[Tensor]] = {head: [] for head in heads}

    def note(layer: nn.Module, _args: Any, output: Tensor) -> None:
        if output.ndim == 4:  # [N, C, height, width]
            output = output.flatten(2).mean(2)
        seen[layer].append(output.flatten(0, -2))  # of tokens too, [N, tokens, C]

    handles = [head.register_forward_hook(note) for head in heads]
    logits_of(model, images)
    for handle in handles:
        handle.remove()
    for head, outputs in seen.items():
        if outputs:
            _whiten(head, torch.cat(outputs).double())


def _is_head(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear | nn.Conv2d) and len(weight) == CLASSES


def _whiten(head: nn.Module, outputs: Tensor) -> None:
    mean, covariance = outputs.mean(0), outputs.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    scale = 2 * values.clamp(min=1e-4 * float(values[-1])).rsqrt()
    matrix = vectors @ torch.diag(scale) @ vectors.T
    head.weight.copy_((matrix @ head.weight.double().flatten(1)).view_as(head.weight))
    if head.bias is not None:
        head.bias.copy_(matrix @ (head.bias.double() - mean))


def digest(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of all tensors."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(name.encode())
        total.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def unlearn(case: Case, model: nn.Module, depth: str) -> tuple[Result, nn.Module | None]:
    """Runs one level and checks it on images; returns the unlearned model too, if there is one."""
    started, result = time.perf_counter(), Result()
    shape = (3, case.side, case.side)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = zsu_fast.ZeroShotUnlearner(
                model, FORGET, depth=depth, input_shape=shape, **_OPTIONS
            )
            run.options.deep = replace(run.options.deep, **FEW)
            unlearned = run.run()
    except zsu_fast.ZsuFastError as error:
        return Result(outcome="refused", reason=str(error), notes=[type(error).__name__]), None
    except Exception as error:  # noqa: BLE001  a row of the table
        return Result(outcome="crash", reason=f"{type(error).__name__}: {error}"), None
    result.seconds = time.perf_counter() - started
    assert run.verdict is not None
    result.level = run.verdict.level
    result.notes = [str(w.message) for w in caught]
    _measure(result, case, model, unlearned, run)
    said = run.verdict.failures + ([] if run.verdict.passed else [str(run.verdict.sentence)])
    if "fallback" in run.record.depth:
        said.append(str(run.record.depth["fallback"]))
    wrong = _shortfalls(result)
    changed = [text for text in run.verdict.warnings if "retained answers" in text]
    told = run.verdict.failures or (changed and wrong == _kept_shortfall(result))
    said += changed if wrong else []
    if wrong and not told:
        result.outcome, result.reason = "silent", "; ".join(wrong)
    elif said or wrong:
        result.outcome, result.reason = "warned", " ".join(dict.fromkeys(said + wrong))
    return result, unlearned


def _measure(result: Result, case: Case, model: nn.Module, unlearned: nn.Module, run: Any) -> None:
    images = images_of(case, IMAGES, seed=99)
    before, after = logits_of(model, images), logits_of(unlearned, images)
    hidden = torch.zeros(CLASSES, dtype=torch.bool)
    hidden[FORGET] = True
    was_forgotten = hidden[before.argmax(1)]
    masked = before.masked_fill(hidden, -torch.inf).argmax(1)
    answers = after.argmax(1)
    result.leak = 100 * float(hidden[answers].float().mean())
    result.kept = 100 * float((answers == masked)[~was_forgotten].float().mean())
    if len(before.argmax(1).unique()) < CLASSES:
        result.notes.append("some class is the answer for none of the images")
    if result.level == "deep":
        last = run.rows.deep.last.parameters
        mixed = unlearned.state_dict() | {n: model.state_dict()[n] for n in last}
        unmasked = _like(model, mixed)
        result.back = 100 * float(
            hidden[logits_of(unmasked, images).argmax(1)][was_forgotten].float().mean()
        )


def _like(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy of ``model`` with the tensors of ``state``."""
    other = copy.deepcopy(model)
    own = other.state_dict()  # with the metadata without which MNASNet refuses to load
    own.update(state)
    other.load_state_dict(own)
    return other


def _shortfalls(result: Result) -> list[str]:
    """What is wrong on images, in words."""
    texts = []
    assert result.leak is not None
    if result.leak > 1:
        texts.append(f"{result.leak:.1f} % of images are assigned to a forgotten class")
    texts += _kept_shortfall(result)
    if result.back is not None and result.back > MOST_BACK:
        texts.append(f"the original last layer recognises {result.back:.1f} % again")
    return texts


def _kept_shortfall(result: Result) -> list[str]:
    assert result.kept is not None
    if result.kept >= KEPT[result.level]:
        return []
    return [f"only {result.kept:.1f} % of other answers stayed on images"]


def reload(case: Case, unlearned: nn.Module, folder: Path) -> str:
    """Saves the weights, loads them into a fresh model, and compares logits; "ok", or why not."""
    path = folder / "weights.safetensors"
    checkpoint.save_weights(path, unlearned)
    fresh = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.load_into(fresh, path)
    images = images_of(case, 8, seed=5)
    same = torch.equal(logits_of(fresh, images), logits_of(unlearned, images))
    return "ok" if same else "other logits after loading"


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = pick_logits(self.model(x))
        return logits


def export(model: nn.Module, images: Tensor) -> str:
    """Exports by torch.export and compares logits; "ok", or why not."""
    program = torch.export.export(_Logits(model), (images,))
    return _close(program.module()(images), logits_of(model, images))


def onnx(model: nn.Module, images: Tensor, folder: Path) -> str:
    """Exports to ONNX and runs it by onnxruntime; "ok", or why not."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what the exporter needs
    except ImportError as error:
        return f"{error.name} is not installed"
    path = folder / "model.onnx"
    program = torch.onnx.export(_Logits(model), (images,), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return _close(torch.from_numpy(logits), logits_of(model, images))


def _close(got: Tensor, want: Tensor) -> str:
    error = float((got - want).detach().abs().max())
    limit = 1e-3 * max(1.0, float(want.abs().max()))
    return "ok" if error <= limit else f"logits differ by {error:.2g}"


def deploy(case: Case, unlearned: nn.Module, original: nn.Module) -> Iterator[tuple[str, str]]:
    """Yields each check of an unlearned model with its outcome.

    What fails is tried with the original too: then it is no fault of the unlearning.
    """
    images = images_of(case, 2, seed=6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for check, call in (
            ("reload", lambda _: reload(case, unlearned, folder)),
            ("export", lambda model: export(model, images)),
            ("onnx", lambda model: onnx(model, images, folder)),
        ):
            outcome = _quietly(call, unlearned)
            if outcome != "ok" and check != "reload":
                same = _quietly(call, original) == outcome
                outcome = f"{'as the original' if same else 'UNLIKE THE ORIGINAL'}: {outcome}"
            yield check, outcome


def _quietly(call: Any, model: nn.Module) -> str:
    """What ``call`` returns, or the first line of what it raises; nothing is printed."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return str(call(model))
    except Exception as error:  # noqa: BLE001  a row of the table
        cause = error.__cause__ if type(error).__name__ == "ConversionError" else None
        shown = cause or error
        return f"{type(shown).__name__}: {(str(shown).splitlines() or [''])[0][:160]}"


def measure(case: Case, exports: bool = True) -> Row:
    """All of a model's row."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    row = Row(str(case), case.family, case.side)
    model = case.build()
    row.parameters = sum(p.numel() for p in model.parameters())
    try:
        spread(model, images_of(case, 256, seed=1))
    except Exception as error:  # noqa: BLE001  it takes no images: the package should say so
        row.checks["runs"] = f"{type(error).__name__}: {error}"
    before = digest(model)
    row.output, shallow = unlearn(case, model, "output")
    row.deep, deep = unlearn(case, model, "deep")
    row.checks["original"] = "ok" if digest(model) == before else "the original was changed"
    unlearned = deep if deep is not None else shallow
    if unlearned is not None:
        for name, outcome in deploy(case, unlearned, model):
            if exports or name == "reload":
                row.checks[name] = outcome
    row.seconds = time.perf_counter() - started
    return row
