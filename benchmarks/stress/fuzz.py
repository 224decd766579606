"""Damaged files, invalid arguments: only documented errors, nothing executed, nothing changed.

    python -m benchmarks.stress.fuzz                   # 20,000 files, 5,000 sets of arguments
    python -m benchmarks.stress.fuzz --files 300 --arguments 50

Files are checkpoints (safetensors and torch.save), deltas and ledgers whose bytes are changed,
inserted, removed or copied from elsewhere, half of them in the header. Every reader has to return
what was written (for a checkpoint: tensors that fit) or raise a `ZsuFastError`. An audit hook
detects anything executed and files opened for writing. Takes less than a minute. Writes
``results/fuzz.md``.
"""

from __future__ import annotations

import argparse
import copy
import encodings.cp437  # noqa: F401  zipfile imports it for names of other systems; not while watched
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import zsu_fast
from benchmarks.harness import RESULTS
from zsu_fast import Ledger, ZsuFastError
from zsu_fast.models import checkpoint, zoo
from zsu_fast.models.parameters import weights_hash
from zsu_fast.provenance.ledger import verify
from zsu_fast.unlearner import ZeroShotUnlearner

# Audit events that running a payload would raise.
EXECUTED = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "exec",
            "os.mkdir", "os.remove", "os.rename", "shutil.rmtree", "socket.connect")  # fmt: skip


class Watch:
    """While on, counts audit events that reading a file must not cause."""

    def __init__(self) -> None:
        self.on, self.seen = False, Counter[str]()
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writing = (
            event == "open" and isinstance(arguments[1], str) and set("wax+") & {*arguments[1]}
        )
        if writing or event in EXECUTED:
            self.seen[f"{event} {str(arguments)[:80]}"] += 1


def mutate(whole: bytes, header: int, draw: random.Random) -> bytes:
    """Makes one to four random changes, half of them within the first ``header`` bytes."""
    mutant = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(max(1, min(len(mutant), draw.choice((header, len(whole))))))
        length = draw.choice((1, 2, 8, 100))
        kind = draw.randrange(6)
        if kind == 0:
            mutant[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del mutant[at : at + length]
        elif kind == 2:
            mutant[at:at] = bytes(draw.randrange(256) for _ in range(length))
        elif kind == 3:
            other = draw.randrange(len(whole))
            mutant[at : at + length] = whole[other : other + length]
        elif kind == 4:
            del mutant[at:]
        elif at < len(mutant):
            mutant[at] ^= 1 << draw.randrange(8)
    return bytes(mutant)


class Targets:
    """Valid files of every kind, and checks of what reading a mutant gives."""

    def __init__(self, folder: Path) -> None:
        self.base = zoo.load("lenet5")
        small = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
        self.small = small
        self.result = copy.deepcopy(small)
        with torch.no_grad():
            self.result[3].weight += 1
            self.result[3].bias -= 1
        self.fresh = copy.deepcopy(small)
        checkpoint.save_weights(folder / "a.safetensors", small)
        checkpoint.save_weights(folder / "a.pt", small)
        zsu_fast.save_delta(small, self.result, folder / "delta.safetensors")
        run = ZeroShotUnlearner(
            small, [1], input_shape=(3, 2, 2), mean=0.5, std=0.5, tail="last", steps=5,
            max_steps=5, restarts=0, impressions_per_class=4, mixtures=16, progress=False,
        )  # fmt: skip
        run.run()
        for i in range(4):
            run.record.weights_before, run.record.weights_after = str(i), str(i + 1)
            Ledger(folder / "ledger.jsonl", f"request {i}").append(run.record)
        self.head = Ledger(folder / "ledger.jsonl").head
        assert run.impressions is not None
        run.impressions.save(folder / "impressions.safetensors")
        self.whole = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock"}

    def read(self, name: str, path: Path, same: bool) -> str:
        """Reads a mutant; returns "accepted" or "refused", and raises otherwise."""
        try:
            if name.startswith("a."):
                checkpoint.load_into(self.fresh, path)
            elif name == "delta.safetensors":
                rebuilt = zsu_fast.apply_delta(self.small, path)
                assert weights_hash(rebuilt) == weights_hash(self.result), "another result"
            elif name == "impressions.safetensors":
                zsu_fast.ClassImpressions.load(path)
            else:
                problems = verify(path, self.head)
                assert same or problems, "damage was not found"
                if problems and verify(path):
                    Ledger(path).entries()
        except ZsuFastError:
            return "refused"
        return "accepted"


def fuzz_files(count: int, seed: int, watch: Watch) -> tuple[Counter[str], list[str]]:
    """Reads ``count`` mutants; returns counts by kind and outcome, and what went wrong."""
    draw, counts, wrong = random.Random(seed), Counter[str](), []
    with tempfile.TemporaryDirectory() as name:
        good, folder = Path(name) / "good", Path(name) / "mutant"
        good.mkdir(), folder.mkdir()
        targets = Targets(good)
        before = weights_hash(targets.small)
        kinds = sorted(targets.whole)
        for i in range(count):
            kind = kinds[i % len(kinds)]
            whole = targets.whole[kind]
            header = 8 + int.from_bytes(whole[:8], "little") if "safetensors" in kind else 1024
            mutant = mutate(whole, header, draw)
            path = folder / kind
            path.write_bytes(mutant)
            watch.on = True
            try:
                outcome = targets.read(kind, path, mutant == whole)
            except Exception:  # noqa: BLE001  any undocumented error is a finding
                outcome = "WRONG"
                wrong.append(f"{kind} {i}: {traceback.format_exc()[-600:]}")
            finally:
                watch.on = False
            if path.read_bytes() != mutant or os.listdir(folder) != [kind]:
                wrong.append(f"{kind} {i}: a file was changed")
            path.unlink()
            counts[f"{kind} {outcome}"] += 1
        if weights_hash(targets.small) != before:
            wrong.append("the base was changed")
    return counts, wrong


def invalid(draw: random.Random) -> Any:
    """A value that somebody could pass by mistake."""
    values: list[Callable[[], Any]] = [
        lambda: None, lambda: True, lambda: -1, lambda: 0, lambda: 1, lambda: 3, lambda: 10**30,
        lambda: 0.5, lambda: -0.0, lambda: float("nan"), lambda: float("inf"), lambda: 1e-300,
        lambda: "", lambda: "auto", lambda: "last", lambda: "fc2", lambda: "nö\0", lambda: b"x",
        list, dict, tuple, lambda: [1], lambda: [1, 1], lambda: [1.5], lambda: (0.2, 0.9),
        lambda: (0.9, 0.2), lambda: [None], lambda: {"a": 1}, lambda: {1, 2}, lambda: range(4),
        lambda: iter([1]), lambda: torch.tensor(2), lambda: torch.tensor([1.0]),
        lambda: torch.tensor([]), lambda: np.array([1, 2]), lambda: np.array(3),
        lambda: np.float32(0.5), lambda: object(), lambda: print, lambda: [[1]], lambda: "cpu",
        lambda: "meta", lambda: "cuda:99", lambda: (3, 2, 2), lambda: (3, 2), lambda: [3, "2", 2],
        lambda: Path("/nonexistent/x"), lambda: 1j, lambda: "masked", lambda: "input",
    ]  # fmt: skip
    return draw.choice(values)()


ARGUMENTS = ("forgotten", "ledger", "tail", "objective", "impressions", "space",
             "impressions_per_class", "confidence", "max_steps", "restarts", "step_size", "beta",
             "input_shape", "mean", "std", "mixtures", "steps", "batch", "learning_rate",
             "weights", "margin", "early_stop", "loop", "precision", "seed", "device", "inplace",
             "cache", "progress", "callback")  # fmt: skip
# Small values, so that a set of arguments that is valid after all ends soon.
VALID: dict[str, Any] = {
    "input_shape": (3, 2, 2), "mean": 0.5, "std": 0.5, "steps": 3, "max_steps": 3, "restarts": 0,
    "impressions_per_class": 4, "mixtures": 8, "batch": 8, "progress": False,
}  # fmt: skip


def fuzz_arguments(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Calls `unlearn` with random arguments, one to four of them invalid."""
    draw, counts, wrong = random.Random(seed), Counter[str](), []
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    back = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        Path("mine").write_bytes(b"precious")
        for i in range(count):
            options = dict(VALID)
            for argument in draw.sample(ARGUMENTS, draw.choice((1, 1, 2, 4))):
                options[argument] = invalid(draw)
            for few in ("steps", "max_steps", "impressions_per_class", "mixtures", "restarts"):
                if isinstance(options[few], int) and options[few] > 1000:
                    options[few] = 3  # a valid value that would run for years
            forget = draw.choice([1, [0, 2], invalid(draw)])
            given = {k: v for k, v in options.items() if VALID.get(k, VALID) is not v}
            case = f"{i}: forget={forget!r:.40} {given!r:.300}"
            may_change = False
            try:
                zsu_fast.unlearn(model, forget, **options)
                counts["accepted"] += 1
                may_change = options.get("inplace") is True
            except ZsuFastError as error:
                counts[type(error).__name__] += 1
            except Exception:  # noqa: BLE001  any undocumented error is a finding
                counts["WRONG"] += 1
                wrong.append(f"{case}\n{traceback.format_exc()[-500:]}")
            changed = any(not torch.equal(t, state[n]) for n, t in model.state_dict().items())
            if changed and not may_change:
                wrong.append(f"{case}: the model was changed")
            model.load_state_dict(state)
            if Path("mine").read_bytes() != b"precious":
                wrong.append(f"{case}: a file was changed")
        os.chdir(back)
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--arguments", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    watch, started = Watch(), time.perf_counter()
    files, wrong = fuzz_files(options.files, options.seed, watch)
    wrong += [f"while reading: {event} ({n} times)" for event, n in watch.seen.items()]
    arguments, more = fuzz_arguments(options.arguments, options.seed)
    wrong += more
    lines = [f"| {name} | {count:,} |" for name, count in sorted(files.items())]
    lines += [f"| arguments: {name} | {count:,} |" for name, count in sorted(arguments.items())]
    text = f"""# Fuzzing

Written by `python -m benchmarks.stress.fuzz`: {options.files:,} damaged files and
{options.arguments:,} sets of arguments, seed {options.seed}, {time.perf_counter() - started:.0f} s.
Undocumented exceptions, wrong results, things executed and files changed: **{len(wrong)}**.

A mutant of a checkpoint is accepted if only numbers changed, since plain weights carry no checksum.
Accepted deltas gave the right result bit for bit; a ledger is accepted only if the mutation left
it as it was.

| outcome | count |
|---|---:|
"""
    text += "\n".join(lines) + "\n"
    print(text)
    for problem in wrong[:20]:
        print(problem, file=sys.stderr)
    if (options.files, options.arguments) == (20_000, 5_000) and not wrong:
        (RESULTS / "fuzz.md").write_text(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
