"""A run with a cache, killed by SIGKILL at random moments, until it gets through.

    python -m benchmarks.stress.kill_and_resume             # 50 kills, about a minute
    python -m benchmarks.stress.kill_and_resume --kills 5

The run unlearns classes of LeNet5 with a cache folder, a ledger, and its result written to a file.
It is restarted after each kill. After every kill each visible file has to be whole, and every run
that finishes has to give the bits of an undisturbed run. Writes ``results/kill_and_resume.md``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import zsu_fast
from benchmarks.harness import RESULTS
from zsu_fast.models import checkpoint, zoo
from zsu_fast.models.parameters import weights_hash
from zsu_fast.provenance.ledger import verify
from zsu_fast.synthesis.ascent_settings import BatchLimits


def work(folder: Path, ready: Connection) -> None:
    """One run, in a process of its own."""
    warnings.simplefilter("ignore")
    ready.send("go")
    run = zsu_fast.ZeroShotUnlearner(
        zoo.load("lenet5"), [1, 2], impressions_per_class=8, tail="last", steps=60, space="input",
        cache=folder / "cache", ledger=folder / "ledger.jsonl", progress=False,
    )  # fmt: skip
    # eight shards instead of one, so that there is something to resume
    run.options.ascent = replace(
        run.options.ascent, limits=BatchLimits(values=10 * 28 * 28, batches_per_shard=1)
    )
    checkpoint.save_weights(folder / "out.safetensors", run.run())


def start(folder: Path) -> multiprocessing.process.BaseProcess:
    """Starts a child process; returns once its run has begun."""
    context = multiprocessing.get_context("fork")  # saves the imports
    ours, theirs = context.Pipe()
    child = context.Process(target=work, args=(folder, theirs))
    child.start()
    ours.recv()
    return child


def broken(folder: Path) -> list[str]:
    """Visible files that can't be read whole; drafts have names that start with a dot."""
    wrong = []
    for path in folder.rglob("*.safetensors"):
        if path.name.startswith("."):
            continue
        try:
            checkpoint.load_tensors(path)
        except zsu_fast.CheckpointError as error:
            wrong.append(str(error))
    ledger = folder / "ledger.jsonl"
    if ledger.exists():
        wrong += verify(ledger)
    return wrong


def finish(folder: Path) -> str:
    """Checks a finished run, clears the folder except the cache, and returns the weights' hash."""
    model = zoo.build("lenet5")
    checkpoint.load_into(model, folder / "out.safetensors")
    found = weights_hash(model)
    assert verify(folder / "ledger.jsonl", model=model) == []
    (folder / "out.safetensors").unlink()
    (folder / "ledger.jsonl").unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    holder = tempfile.TemporaryDirectory() if options.folder is None else None
    folder = Path(holder.name) if holder else options.folder
    draw, wrong = random.Random(options.seed), []

    def undisturbed(name: str) -> tuple[str, float]:
        (folder / name).mkdir()
        begun = time.perf_counter()
        child = start(folder / name)
        child.join()
        return finish(folder / name), time.perf_counter() - begun

    expected, seconds = undisturbed("undisturbed")
    place = folder / "killed"
    place.mkdir()
    kills = finished = shards = 0
    while kills < options.kills:
        child = start(place)
        child.join(draw.uniform(0, 1.2 * seconds))
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
            wrong += broken(place)
            shards = max(shards, len(list((place / "cache").rglob("0*.safetensors"))))
            if (place / "ledger.jsonl").exists():  # killed between the entry and the file
                (place / "ledger.jsonl").unlink()
            (place / "out.safetensors").unlink(missing_ok=True)
        elif child.exitcode != 0:
            wrong.append(f"a run ended with {child.exitcode}")
            break
        else:
            finished += 1
            if finish(place) != expected:
                wrong.append("another result")
            for path in (place / "cache").rglob("0*.safetensors"):
                if draw.random() < 0.8:
                    path.unlink()  # leave the next runs some work
    start(place).join()
    if not wrong and finish(place) != expected:
        wrong.append("another result at the end")
    text = f"""# Killed and resumed

Written by `python -m benchmarks.stress.kill_and_resume --kills {options.kills}`: {kills} kills by
SIGKILL at uniformly random moments of a run that takes {seconds:.1f} s, seed {options.seed}.
{finished + 1} runs finished between and after them. At most {shards} shards were in the cache for
the next run. Broken files visible, different results, runs that did not resume: **{len(wrong)}**.
"""
    print(text)
    for problem in wrong[:10]:
        print(problem, file=sys.stderr)
    if options.kills == 50 and not wrong:
        (RESULTS / "kill_and_resume.md").write_text(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
