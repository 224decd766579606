"""Layouts of weights files: each gives exactly the right weights or a clear error, never others.

    python -m benchmarks.stress.fuzz_checkpoints                  # 5,000 files, one minute or two
    python -m benchmarks.stress.fuzz_checkpoints --cases 300

A case is a model and a file of its weights: under random keys, behind random prefixes, in random
order and dtype, with or without averaged weights (EMA), with what training scripts store beside
them, under any ending, as safetensors or in either format of ``torch.save``. Into a third of the
files a fault is put: a tensor that is missing, renamed, of another shape or of integers, an unknown
one, a class that could run code, a file that is cut off, or the weights of another model with the
same shapes. What is right is known from how the file was made, not from the code that reads it.
Writes ``results/fuzz_checkpoints.md``.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import itertools
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.harness import RESULTS
from zsu_fast.errors import ArgumentError, CheckpointError
from zsu_fast.models import checkpoint

State = dict[str, Tensor]
PLAIN_KEYS = ("state_dict", "model_state_dict", "model", "net", "module", "model_state", "weights",
              "network", "params")  # fmt: skip
EMA_KEYS = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "swa_state_dict",
            "model_ema_state_dict", "params_ema", "averaged_model")  # fmt: skip
PLAIN_PREFIXES = ("", "module.", "model.", "net.", "model.module.", "_orig_mod.", "network.",
                  "module._orig_mod.", "model.net.")  # fmt: skip
EMA_PREFIXES = ("ema_model.", "ema.", "model_ema.module.", "swa_model.module.")
OTHER_PREFIXES = ("encoder.", "student.", "backbone.body.", "1.")
BESIDE = {"criterion.weight": (5,), "metric.total": (), "train_acc.correct": (2,),
          "loss_fn.centres": (5, 4)}  # fmt: skip
ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".safetensors", ".weights", "", ".model")
FAULTS = ("missing", "renamed", "shape", "integers", "unknown", "code", "cut off", "other model")


class Code:
    """An object of this class is what a pickle of code looks like."""


class Block(nn.Module):
    """A convolution with BatchNorm, so that there are buffers and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.hidden, self.fc = Block(), nn.Linear(4, 4), nn.Linear(4, 5)


class Other(nn.Module):
    """The shapes of `Plain`, other names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.proj, self.head = Block(), nn.Linear(4, 4), nn.Linear(4, 5)


class Wrapper(nn.Module):
    """The user's own wrapper: every name of the model starts with "model."."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Plain()


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain, "wrapper": Wrapper, "sequential": sequential,
    "one layer": lambda: nn.Linear(4, 5),
}  # fmt: skip


def random_state(model: nn.Module, draw: random.Random) -> State:
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    return {
        n: torch.randn(t.shape, generator=generator) if t.is_floating_point() else torch.tensor(7)
        for n, t in model.state_dict().items()
    }


@dataclass
class Case:
    """A file, and what loading it has to give.

    Attributes:
        kind: a word for the table.
        content: what the file holds.
        right: the weights to load; None if the file must be refused.
        must_load: whether refusing it would be wrong, too.
        must_warn: whether an `UnlearningWarning` has to tell of a choice.
        entry: what to ask for after ``::``.
        fault: what is wrong with the file, if anything.
    """

    kind: str
    content: dict[str, Any]
    right: State | None
    must_load: bool = False
    must_warn: bool = False
    entry: str = ""
    fault: str = ""


def beside(model: nn.Module, draw: random.Random) -> dict[str, Any]:
    """What training scripts store next to the weights."""
    optimiser = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    entries: dict[str, Callable[[], Any]] = {
        "epoch": lambda: 3, "arch": lambda: "net", "best_acc1": lambda: np.float64(0.5),
        "args": lambda: argparse.Namespace(lr=0.1, out=Path("runs"), seed=np.int64(3)),
        "optimizer": optimiser.state_dict, "scaler": lambda: {"scale": 2.0**16},
        "history": lambda: np.arange(3.0), "when": lambda: datetime.datetime(2024, 1, 2),
        "counts": lambda: collections.defaultdict(int, a=1), "rng_state": torch.get_rng_state,
        "lr_schedulers": lambda: [{"last_epoch": 3}], "hyper_parameters": lambda: {"lr": 0.1},
    }  # fmt: skip
    return {k: make() for k, make in entries.items() if draw.random() < 0.3}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def shuffled(state: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    items = list(state.items())
    draw.shuffle(items)
    return dict(items)


def with_fault(state: State, fault: str, draw: random.Random) -> State:
    """Puts a fault into a state dict; those of files ("code", "cut off") are not made here."""
    state, name = dict(state), draw.choice([n for n in state if "num_batches" not in n])
    if fault == "missing":
        del state[name]
    elif fault == "renamed":
        state[name.replace("weight", "kernel").replace("bias", "shift") + "_"] = state.pop(name)
    elif fault == "shape":
        state[name] = torch.zeros(*state[name].shape, 2)
    elif fault == "integers":
        state[name] = torch.ones(state[name].shape, dtype=torch.int8)
    elif fault == "unknown":
        state[f"{name.rpartition('.')[0]}.extra".lstrip(".")] = torch.zeros(3)
    elif fault == "other model":
        return {n.replace("block.", "stem.").replace("hidden.", "proj.").replace("fc.", "head."): t
                for n, t in Plain().state_dict().items()}  # fmt: skip
    return state


def make_case(model: nn.Module, draw: random.Random) -> Case:
    """Draws a layout, and derives from how it is made what has to be loaded."""
    dtype = draw.choice([torch.float32] * 3 + [torch.float16, torch.bfloat16, torch.float64])
    raw, ema = ({n: t.to(dtype) if t.is_floating_point() else t for n, t in one.items()}
                for one in (random_state(model, draw), random_state(model, draw)))  # fmt: skip
    if isinstance(model, Wrapper) and draw.random() < 0.5:  # the file is of the inner model
        stored_raw, stored_ema = ({n.removeprefix("model."): t for n, t in one.items()}
                                  for one in (raw, ema))  # fmt: skip
    else:
        stored_raw, stored_ema = raw, ema
    fault = draw.choice(FAULTS) if draw.random() < 0.33 else ""
    if fault == "other model" and not isinstance(model, Plain):
        fault = "missing"
    prefix = draw.choice(PLAIN_PREFIXES)
    faulty = with_fault(stored_raw, fault, draw) if fault else stored_raw
    case = Case("one state dict", prefixed(faulty, prefix), None if fault else raw, not fault)
    layout = draw.choice(
        ("plain", "beside", "ema key", "ema prefix", "ema alone", "copy", "two", "part", "common")
    )
    extra = {n: torch.ones(s) for n, s in BESIDE.items() if draw.random() < 0.6} or {
        "criterion.weight": torch.ones(5)
    }
    key = draw.choice(PLAIN_KEYS)
    case.kind, case.fault = layout, fault
    if layout == "beside":
        case.content |= extra
        case.must_warn = True
    elif layout == "ema prefix":
        case.content |= prefixed(stored_ema, draw.choice(EMA_PREFIXES))
        case.must_warn = True
        if fault == "other model":  # nothing else claims to be the weights of this one
            case.right = ema
    elif layout == "ema alone":
        case.content = prefixed(faulty, draw.choice((*EMA_PREFIXES, "")))
        key = draw.choice(EMA_KEYS)
    elif layout == "part":  # of another model: no word says that it is the classifier
        case.content = prefixed(faulty, draw.choice(OTHER_PREFIXES)) | {"2.weight": torch.ones(3)}
        case.right, case.must_load = None, False
    elif layout == "common":
        case.content = prefixed(faulty, draw.choice(OTHER_PREFIXES))
        case.must_load = not fault and not isinstance(model, Wrapper)
    content = shuffled(case.content, draw)
    nested = draw.random() < 0.7 or layout in ("ema key", "copy", "two", "ema alone")
    if not nested:
        case.content = content | (beside(model, draw) if draw.random() < 0.5 else {})
    else:
        case.content = {key: content} | beside(model, draw)
        if draw.random() < 0.1:
            case.content = {"checkpoint": case.content}
    outer = case.content.get("checkpoint", case.content) if nested else case.content
    if nested:
        add_entry(case, outer, key, (stored_ema, ema), draw)
    if fault == "code":
        case.content["config"] = Code()
    if fault in ("code", "cut off"):
        case.right, case.must_load = None, False
    case.content = shuffled(case.content, draw)
    return case


def add_entry(
    case: Case, outer: dict[str, Any], key: str, ema: tuple[State, State], draw: random.Random
) -> None:
    """Adds the second state dict of layouts that have two, beside ``outer[key]``.

    ``ema`` holds other weights, by their names in the file and in the model.
    """
    stored, right = ema
    second = draw.choice([k for k in PLAIN_KEYS if k != key])
    other_model = case.fault == "other model"  # so that only the second has the model's names
    if case.kind == "ema key":
        second = draw.choice(EMA_KEYS)
        outer[second] = prefixed(stored, draw.choice(PLAIN_PREFIXES))
        case.must_warn = True
        if draw.random() < 0.4:
            case.entry, case.right, case.must_load, case.must_warn = second, right, True, False
        elif other_model:
            case.right = right
    elif case.kind == "copy":
        outer[second] = dict(outer[key])
    elif case.kind == "two":  # equally good, other values
        outer[second] = prefixed(stored, draw.choice(PLAIN_PREFIXES))
        case.right, case.must_load = (right, True) if other_model else (None, False)
        if not other_model and draw.random() < 0.5:
            case.entry, case.right, case.must_load = second, right, True


def write(case: Case, path: Path, draw: random.Random) -> None:
    flat = all(isinstance(value, Tensor) for value in case.content.values())
    if flat and draw.random() < 0.6:
        save_file({n: t.clone().contiguous() for n, t in case.content.items()}, path)
    else:
        torch.save(case.content, path, _use_new_zipfile_serialization=draw.random() < 0.8)
    if case.fault == "cut off":
        whole = path.read_bytes()
        path.write_bytes(whole[: draw.randrange(len(whole) * 9 // 10)])


def equal(state: dict[str, Tensor], want: State) -> bool:
    """Whether names, dtypes and values are the same."""
    return state.keys() == want.keys() and all(
        state[n].dtype == want[n].dtype and torch.equal(state[n], want[n]) for n in want
    )


def check(model: nn.Module, case: Case, path: Path) -> tuple[str, str]:
    """Loads the file; returns the outcome, and what is wrong with it ("" for nothing)."""
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            checkpoint.load_into(model, f"{path}::{case.entry}" if case.entry else path)
        except (CheckpointError, ArgumentError) as error:
            if not equal(model.state_dict(), before):
                return "refused", "the model was changed"
            if not str(error).startswith(("weights: ", "model: ")) or "\x1b" in str(error):
                return "refused", f"unclear: {error}"
            return "refused", f"refused: {error}" if case.must_load else ""
        except Exception:  # noqa: BLE001  any undocumented error is a finding
            return "another error", traceback.format_exc()[-700:]
    if case.right is None:
        return "loaded", "loaded what had to be refused"
    if not equal(model.state_dict(), case.right):
        return "loaded", "OTHER WEIGHTS"
    if case.must_warn and not told:
        return "loaded", "a choice was not told"
    return "loaded with a warning" if told else "loaded", ""


def fuzz(count: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Runs ``count`` cases; returns counts by (layout, outcome), and the findings."""
    draw, counts, wrong = random.Random(seed), Counter[tuple[str, str]](), []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            kind = draw.choice(list(MODELS))
            case = make_case(MODELS[kind](), draw)
            path = Path(folder) / f"weights{draw.choice(ENDINGS)}"
            write(case, path, draw)
            outcome, finding = check(MODELS[kind](), case, path)
            name = f"{case.kind}, fault" if case.fault else case.kind
            counts[name, outcome] += 1
            if finding:
                keys = {k: list(v)[:9] if isinstance(v, dict) else type(v).__name__
                        for k, v in itertools.islice(case.content.items(), 12)}  # fmt: skip
                wrong.append(
                    f"{i}: {kind}, {case.kind}, fault {case.fault!r}, {path.name}, entry "
                    f"{case.entry!r}, {keys}: {finding}"
                )
            path.unlink()
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    counts, wrong = fuzz(options.cases, options.seed)
    outcomes = sorted({outcome for _, outcome in counts})
    lines = [f"| layout | {' | '.join(outcomes)} |", "|---|" + "---:|" * len(outcomes)]
    for layout in sorted({name for name, _ in counts}):
        numbers = " | ".join(f"{counts[layout, outcome]:,}" for outcome in outcomes)
        lines.append(f"| {layout} | {numbers} |")
    text = f"""# Fuzzing the layouts of weights files

Written by `python -m benchmarks.stress.fuzz_checkpoints`: {options.cases:,} files, seed
{options.seed}, {time.perf_counter() - started:.0f} s. Other weights than the right ones, choices
not told, valid files refused, undocumented exceptions and changed models: **{len(wrong)}**.

A file with a fault is loaded only if other weights in it are whole, and were asked for or are the
only ones with the model's names. "two": two state dicts of equal standing, refused unless one is
asked for. "part": the tensors lie behind a prefix that may be a part of another model, refused.

"""
    text += "\n".join(lines) + "\n"
    print(text)
    for problem in wrong[:20]:
        print(problem, file=sys.stderr)
    if options.cases >= 5_000 and not wrong:
        (RESULTS / "fuzz_checkpoints.md").write_text(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
