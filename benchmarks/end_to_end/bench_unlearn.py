"""Whole calls of `unlearn` against plain torch, one lever after another.

    python -m benchmarks.end_to_end.bench_unlearn                     # all models, about 20 minutes
    python -m benchmarks.end_to_end.bench_unlearn lenet5 --runs 9

Every row makes the same number of impressions from the same noise, trains the same layers on the
masked objective, and is scored on the real test images outside the timed part. Rows (a) and (b)
follow the paper's Algorithm 1 as it reads. The rival (c) is the package's schedule in plain torch:
``examples/unlearn_in_plain_torch.py``, which uses nothing of the package and draws its own noise.
The rows between (b) and ours are ablations: the package with levers switched off by patches that
live in this file. Writes ``cpu_unlearn.csv`` (one line per call) and ``cpu_unlearn.md``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zsu_fast
from benchmarks.end_to_end.table1 import Data, load_data, load_model
from benchmarks.harness import RESULTS, machine
from examples.unlearn_in_plain_torch import unlearn as unlearn_in_plain_torch
from zsu_fast import ops
from zsu_fast.models import zoo
from zsu_fast.runtime import inference
from zsu_fast.synthesis import ascent, inference_copy, space as space_module
from zsu_fast.synthesis.inference_copy import InferenceCopy
from zsu_fast.synthesis.synthesize import to_impressions
from zsu_fast.training import train_step
from zsu_fast.unlearner import ZeroShotUnlearner

ASCENT_STEPS = 200  # (a), (b): of every impression
# Whole-model epochs of (a), (b): tried 10, 12, 25, 50, 100 at several rates; the fewest that reach
# our RA on both models of the paper, which had 100.
EPOCHS, BATCH, RATE = 25, 32, 3e-3
_PAPER: dict[str, Any] = {"depth": "output", "space": "input"}  # as in the paper
FA_SLACK, RA_SLACK = 0.5, 0.5  # per cent: what counts as the same quality


@dataclass(frozen=True)
class Case:
    """A model and what it is to forget; bars count for the paper's two."""

    model: str
    data: str
    forget: tuple[int, ...]
    per_class: int = 32
    bars: bool = True


CASES = [
    Case("lenet5", "mnist", (1, 2, 3, 4)),
    Case("karpathynet", "cifar10", (3, 4, 8)),
    Case("resnet20_cifar", "cifar10", (3, 4, 8), per_class=4, bars=False),
]


@dataclass(frozen=True)
class Levers:
    """What is switched on; all off is Algorithm 1 as it reads."""

    batched: bool = False
    stop: bool = False
    compact: bool = False
    cached: bool = False
    input_only: bool = False
    folded: bool = False
    pooled: bool = False
    channels_last: bool = False
    bfloat16: bool = False
    native: bool = False
    fused: bool = False
    compiled: bool = False


def ladder() -> dict[str, Levers]:
    """Each row has the levers of the row before and one more."""
    names = {
        "batched": "(b) + all impressions in one batch",
        "stop": "+ confidence stop (batch ends with its last row)",
        "compact": "+ compaction: finished rows leave the batch",
        "cached": "+ cached backbone, mixtures, stop rule",
        "input_only": "+ no weight gradients",
        "folded": "+ folded batch norms",
        "pooled": "+ pooling before relu",
        "channels_last": "+ channels-last",
        "bfloat16": "+ bfloat16",
        "native": "+ native kernels",
        "fused": "ours: + fused AdamW, called directly",
        "compiled": "+ compiled tail (not the default)",
    }
    levers = Levers()
    rows = {"(a) one impression after another": levers}
    for lever, name in names.items():
        levers = replace(levers, **{lever: True})
        rows[name] = levers
    return rows


LADDER = ladder()
A, B, OURS = (next(k for k in LADDER if k.startswith(p)) for p in ("(a)", "(b)", "ours"))
C = "(c) the schedule in plain torch"
# Everything that is measured. (c) has no levers: it does not use the package.
CONTENDERS: dict[str, Levers | None] = {A: LADDER[A], B: LADDER[B], C: None, **LADDER}
COMPILED = next(k for k, v in LADDER.items() if v.compiled)


def call(
    model: nn.Module,
    case: Case,
    seed: int,
    levers: Levers | None,
    layers: list[str],
    ascent_steps: int = ASCENT_STEPS,
) -> nn.Module:
    """One whole call; ``levers`` None is the rival (c).

    ``layers`` are the parameters to train, for rows that don't find them.
    """
    if levers is None:
        spec = zoo.ZOO[case.model].spec
        return unlearn_in_plain_torch(
            model,
            case.forget,
            mean=spec.mean,
            std=spec.std,
            shape=spec.shape,
            seed=seed,
            per_class=case.per_class,
        )
    options: dict[str, Any] = {"seed": seed, "impressions_per_class": case.per_class}
    options |= _PAPER
    if levers.fused:
        loop = "compiled" if levers.compiled else "auto"
        return zsu_fast.unlearn(model, case.forget, loop=loop, **options)
    with switched(levers):
        run = ZeroShotUnlearner(model, case.forget, **options)
        if levers.stop:
            run.synthesise()
        else:
            run.impressions = fixed_ascent(run, levers.batched, ascent_steps)
        if levers.cached:
            run.split()
            run.fit()
            return run.apply()
        return whole_model_epochs(run, layers)


def fixed_ascent(run: ZeroShotUnlearner, batched: bool, steps: int) -> Any:
    """Adam ascent of ``steps`` steps for each impression, as a reader of the paper writes it.

    An image is kept as it was when it reached its confidence: pushed on, it teaches nothing and
    the quality would differ. The steps behind that point are taken all the same.
    """
    space = space_module.input_space(run.work, run.spec, run.options.ascent.precision)
    per_class = run.options.ascent.per_class
    labels = torch.arange(run.classes).repeat_interleave(per_class)
    number = torch.arange(per_class).repeat(run.classes)
    made = ascent.Ascent(space, labels, number, run.options.ascent, len(labels))
    rows = made.fill()
    index = torch.arange(len(rows.index))
    for part in index.split(len(index) if batched else 1):
        x, label, target = rows.x[part].clone(), rows.label[part], rows.target[part]
        x.requires_grad_(True)
        kept, reached = x.detach().clone(), torch.zeros(len(part), dtype=torch.bool)
        optimiser = torch.optim.Adam([x], lr=float(made.rate))
        for _ in range(steps):
            logits = made.model(x)
            own = logits.gather(1, label[:, None])[:, 0]
            loss = -(own.sum() - made.beta * x.square().sum())
            made.model.module.zero_grad()
            optimiser.zero_grad()
            loss.backward()
            with torch.no_grad():
                confidence = logits.softmax(1).gather(1, label[:, None])[:, 0]
                going = (~reached).view(-1, 1, 1, 1)
                kept = torch.where(going, x, kept)
                reached |= confidence >= target
                optimiser.step()
                x.copy_(torch.minimum(torch.maximum(x, space.low), space.high))
        with torch.no_grad():
            kept = torch.where(reached.view(-1, 1, 1, 1), kept, x)
        for at, number in enumerate(part.tolist()):
            made.points[rows.index[number]] = kept[at]
            made.hit[rows.index[number]] = bool(reached[at])
    index = torch.arange(len(labels))
    return to_impressions(made.result(index), space)


def whole_model_epochs(run: ZeroShotUnlearner, layers: list[str]) -> nn.Module:
    """Epochs through the whole model, backbone frozen, on the impressions alone; masked KL."""
    assert run.impressions is not None
    images, label = run.impressions.images, run.impressions.labels
    model = run.work
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name in layers)
    with torch.no_grad():
        teacher = torch.cat([model(part) for part in images.split(256)])
        own = teacher.gather(1, label[:, None])[:, 0]
        lead = own - teacher.scatter(1, label[:, None], -torch.inf).amax(1)
        shift = 2 * lead.mean().clamp(min=0) * run.forget_mask.float()
        wanted = teacher.masked_fill(run.forget_mask, -torch.inf).softmax(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(run.options.seed)
    for _ in range(EPOCHS):
        for picked in torch.randperm(len(label), generator=generator).split(BATCH):
            log_p = (model(images[picked]) + shift).log_softmax(1)
            loss = F.kl_div(log_p, wanted[picked], reduction="batchmean")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.module


# --- switches -------------------------------------------------------------------------------------


@contextmanager
def switched(levers: Levers) -> Iterator[None]:
    """The package with the levers that are off replaced by plain torch."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        if not levers.bfloat16:
            put(space_module, "inference_copy", copier(levers))
        if not levers.channels_last:
            put(inference.Inference, "_takes_channels_last", lambda *_: False)
        if not levers.input_only:
            put(ascent.Ascent, "step", step_with_weight_gradients)
        if not levers.compact:
            put(ascent, "bucket_size", lambda rows, _d: sys.maxsize if rows else 0)
        if not levers.native:
            put(ops, "ascent_step_", plain_ascent_step_)
            put(inference_copy, "fuse_pools", lambda _: None)
            put(inference_copy, "block_images", lambda *_: None)
            put(inference, "supported_windows", lambda *_args, **_options: None)
            put(train_step.EagerTrainStep, "step", plain_tail_step)
            stack.enter_context(ops.use_backend("eager"))
        if not levers.fused:
            put(train_step.EagerTrainStep, "_fused", lambda _self: False)
        yield


def copier(levers: Levers) -> Callable[..., InferenceCopy]:
    """`inference_copy` without what is off."""

    def made(model: Any, images: Tensor, _precision: str = "auto") -> InferenceCopy:
        if levers.channels_last:
            return inference_copy.inference_copy(model, images, "float32")
        copied = copy.deepcopy(model)
        folded = inference_copy.fold_batch_norms(copied, images) if levers.folded else None
        copied = copied if folded is None else folded
        if levers.pooled:
            copied = inference_copy.pool_before_relu(copied) or copied
        copied.requires_grad_(not levers.input_only)
        return InferenceCopy(copied, False, torch.float32, folded is not None)

    return made


def step_with_weight_gradients(self: Any, batch: Any) -> None:
    """`Ascent.step` by ``loss.backward()``."""
    x = batch.x.detach().requires_grad_(True)
    logits = self.model(x)
    own = logits.gather(1, batch.label[:, None])[:, 0]
    self.model.module.zero_grad()
    own.sum().backward()
    with torch.no_grad():
        probability = logits.softmax(1)
        batch.confidence.copy_(probability.gather(1, batch.label[:, None])[:, 0])
        highest = probability.argmax(1) == batch.label
        last_step = batch.step >= self.settings.max_steps
        batch.reached |= (batch.confidence >= batch.target) & highest & batch.active
        batch.active &= ~batch.reached & ~last_step
        ops.ascent_step_(
            batch.x, x.grad, batch.exp_avg, batch.exp_avg_sq, batch.step, batch.active,
            self.space.low, self.space.high, self.rate, self.beta,
        )  # fmt: skip


@torch.no_grad()
def plain_ascent_step_(
    x: Tensor, grad: Tensor, moment: Tensor, variance: Tensor, step: Tensor, active: Tensor,
    low: Tensor, high: Tensor, lr: Tensor, beta: Tensor,
) -> None:  # fmt: skip
    """One Adam step in plain torch, written to be quick: moments of finished rows don't matter."""
    step += active
    t = step.view(-1, 1, 1, 1)
    g = torch.addcmul(grad, x, beta, value=-2)
    moment.lerp_(g, 0.1)
    variance.mul_(0.999).addcmul_(g, g, value=0.001)
    rate = lr / (1 - 0.9**t)
    denominator = (variance / (1 - 0.999**t)).sqrt_().add_(1e-8)
    moved = torch.addcmul(x, moment / denominator, rate).clamp_(low, high)
    x.copy_(torch.where(active.view(-1, 1, 1, 1), moved, x))


def plain_tail_step(self: Any, picked: Tensor) -> Tensor:
    """A tail step in plain autograd."""
    rows, objective = self.task.train, self.task.objective
    if not hasattr(self, "wanted"):
        self.wanted = rows.teacher.masked_fill(objective.forget, -torch.inf).softmax(1)
    batch = rows.select(picked)
    logits = self.tail(*batch.features)
    if objective.forget_logits_only:
        logits = torch.where(objective.forget, logits, logits.detach())
    log_p = (logits + objective.margin * objective.forget).log_softmax(1)
    loss = F.kl_div(log_p, self.wanted[picked], reduction="batchmean")
    if objective.keep:
        change = (logits - batch.teacher)[:, ~objective.forget].square().sum(1)
        loss = loss + (objective._keep_weights(batch) * change).sum()
    self.optimiser.zero_grad()
    loss.backward()
    self.optimiser.step()
    return loss.detach()


# --- measuring ------------------------------------------------------------------------------------


@dataclass
class Run:
    """One call."""

    model: str
    contender: str
    seed: int
    seconds: float
    fa: float
    ra: float


@dataclass
class Report:
    """All that was measured for one case."""

    case: Case
    runs: list[Run] = field(default_factory=list)
    load: str = ""
    memory: dict[str, float] = field(default_factory=dict)
    profile: list[str] = field(default_factory=list)
    library: float = 0.0  # share of operator time

    def of(self, contender: str) -> list[Run]:
        return [r for r in self.runs if r.contender == contender]

    def seconds(self, contender: str) -> float:
        return statistics.median(r.seconds for r in self.of(contender))

    def quality(self, contender: str) -> tuple[float, float]:
        mine = self.of(contender)
        return statistics.mean(r.fa for r in mine), statistics.mean(r.ra for r in mine)


def measure(case: Case, runs: int, slow_runs: int) -> Report:
    """Rounds in which every contender has its turn; slow ones sit out the later rounds."""
    load = machine()["load"]
    model = load_model(case.model)
    data = load_data(model, case.data)
    layers = trained_layers(model, case)
    report = Report(case)
    warm = replace(case, per_class=4)
    for levers in CONTENDERS.values():  # every code path once, on few impressions
        if levers is None or not levers.compiled:
            call(model, warm, 0, levers, layers, ascent_steps=2)
    turns = {A: 1, B: slow_runs, COMPILED: slow_runs}
    for seed in range(runs):
        for name, levers in CONTENDERS.items():
            if seed >= turns.get(name, runs):
                continue
            started = time.process_time()
            made = call(model, case, seed, levers, layers)
            seconds = time.process_time() - started
            report.runs.append(score(case, name, seed, seconds, made, data))
    report.load = f"{load} at the start, {machine()['load']} at the end"
    profile(report, model)
    for name in (A, B, C, OURS):
        report.memory[name] = statistics.median(peak_growth(case, name) for _ in range(3))
    return report


def score(case: Case, name: str, seed: int, seconds: float, made: nn.Module, data: Data) -> Run:
    e = zsu_fast.evaluate(made, data, case.forget, batch=1000)
    run = Run(case.model, name, seed, seconds, e.forget_accuracy or 0.0, e.retain_accuracy or 0.0)
    print(
        f"{case.model:15}{name:52}seed {seed} {seconds:9.3f} s  FA {run.fa:5.2f}  RA {run.ra:5.2f}",
        flush=True,
    )
    return run


def trained_layers(model: nn.Module, case: Case) -> list[str]:
    """What the package trains in this model, at the output level."""
    run = ZeroShotUnlearner(model, case.forget, impressions_per_class=case.per_class, **_PAPER)
    run.synthesise()
    return run.split().parameters


LIBRARY = ("convolution", "conv2d", "max_pool", "avg_pool", "addmm", "aten::mm", "linear", "onednn")


def profile(report: Report, model: nn.Module, calls: int = 3) -> None:
    """Where the time of our call goes: self time by operator."""
    case = report.case
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for seed in range(calls):
            call(model, case, seed, LADDER[OURS], [])
    spent = {e.key: e.self_cpu_time_total / calls / 1e6 for e in trace.key_averages()}
    library = sum(s for key, s in spent.items() if any(word in key for word in LIBRARY))
    total = sum(spent.values())
    report.library = library / total
    for key, seconds in sorted(spent.items(), key=lambda kv: -kv[1])[:10]:
        report.profile.append(f"| `{key}` | {100 * seconds / total:.1f} |")


def peak_growth(case: Case, name: str) -> float:
    """MB by which a fresh process grows at its peak during one call, warmed up before."""
    command = [sys.executable, "-m", __spec__.name, case.model, "--memory", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def print_peak_growth(case: Case, name: str) -> None:
    """In the fresh process: Linux's high-water mark, set back before the call."""
    model = load_model(case.model)
    layers = trained_layers(model, replace(case, per_class=4))
    call(model, replace(case, per_class=4), 0, CONTENDERS[name], layers, ascent_steps=2)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call(model, case, 0, CONTENDERS[name], layers, ascent_steps=3)
    print(resident("VmHWM") - before)


def resident(kind: str) -> float:
    """A line of /proc/self/status, MB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in status if x.startswith(kind)).split()[1]) / 1024


# --- tables ---------------------------------------------------------------------------------------

BARS = {A: 50.0, B: 8.0, C: 1.7}


def same_quality(report: Report, name: str) -> bool:
    """Whether a contender forgets and keeps as well as ours does, or better."""
    (fa, ra), (our_fa, our_ra) = report.quality(name), report.quality(OURS)
    return abs(fa - our_fa) <= FA_SLACK and abs(ra - our_ra) <= RA_SLACK


def tables(report: Report) -> list[str]:
    case = report.case
    ours = report.seconds(OURS)
    forget = ",".join(map(str, case.forget))
    lines = [
        "",
        f"## {case.model}: forget {{{forget}}} of {case.data}, {case.per_class} images a class",
        "",
        f"Load: {report.load}.",
        "",
        "| whole call | seconds | min to max | runs | ours is | FA | RA | peak MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in (A, B, C, OURS):
        times = [r.seconds for r in report.of(name)]
        fa, ra = report.quality(name)
        lines.append(
            f"| {name} | {report.seconds(name):.3f} | {min(times):.3f} to {max(times):.3f} | "
            f"{len(times)} | {report.seconds(name) / ours:.2f}x faster | {fa:.2f} | {ra:.2f} | "
            f"{report.memory[name]:.0f} |"
        )
    lines += [
        "",
        "| lever (each row adds one) | seconds | min to max | x the row before | x (a) | FA | RA |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    before = first = report.seconds(A)
    for name in LADDER:
        now, (fa, ra) = report.seconds(name), report.quality(name)
        times = [r.seconds for r in report.of(name)]
        lines.append(
            f"| {name} | {now:.3f} | {min(times):.3f} to {max(times):.3f} | {before / now:.2f} | "
            f"{first / now:.1f} | {fa:.2f} | {ra:.2f} |"
        )
        before = now
    lines += [
        "| + captured CUDA graph | not run: GPU only | | | | | |",
        "",
        f"Compiled tail: {report.of(COMPILED)[0].seconds:.2f} s at the first call (compiling "
        f"included), {report.of(COMPILED)[-1].seconds:.2f} s at the last.",
        "",
        f"What is left of our call: library convolutions, pooling and linear layers take "
        f"{100 * report.library:.0f} % of operator time (torch.profiler, self time, the profiler's "
        f"own cost included).",
        "",
        "| operator | % of operator time |",
        "|---|---:|",
        *report.profile,
    ]
    return lines


def verdicts(report: Report) -> list[str]:
    """The bars, each met or missed."""
    lines = []
    for name, bar in BARS.items():
        gain = report.seconds(name) / report.seconds(OURS)
        (fa, ra), (our_fa, our_ra) = report.quality(name), report.quality(OURS)
        met = "met" if gain >= bar else "MISSED"
        same = "same quality" if same_quality(report, name) else "NOT the same quality"
        lines.append(
            f"- {report.case.model}, {name[:3]}: {gain:.2f}x, bar {bar:g}x: {met}; {same} "
            f"(FA {fa:.2f} and {our_fa:.2f}, RA {ra:.2f} and {our_ra:.2f})"
        )
        if gain < bar and name == C:
            verdict = "met" if report.library >= 0.85 else "MISSED"
            lines.append(
                f"  - instead, library layers at least 85 % of what is left: "
                f"{100 * report.library:.0f} % of operator time: {verdict}"
            )
    return lines


def write(reports: list[Report]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "cpu_unlearn.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        facts = machine() | {"date": time.strftime("%Y-%m-%d")}
        del facts["load"]
        writer.writerow([*Run.__dataclass_fields__, "load", *facts])
        for report in reports:
            for run in report.runs:
                figures = [f"{run.seconds:.4f}", f"{run.fa:.4f}", f"{run.ra:.4f}"]
                row = [
                    run.model,
                    run.contender,
                    run.seed,
                    *figures,
                    report.load,
                    *facts.values(),
                ]
                writer.writerow(row)
    lines = [
        "# Whole calls",
        "",
        f"Made by `{' '.join(['python -m benchmarks.end_to_end.bench_unlearn', *sys.argv[1:]])}`.",
        "",
        ", ".join(f"{k}: {v}" for k, v in facts.items()),
        "",
        f"Seconds: CPU time of the process from call to result (one thread, so the wall time of a "
        f"machine that does nothing else; compiling in helper processes is not in it), median, "
        f"contenders in turn, warm-up excluded; run i has seed i. FA and RA: per cent of the real "
        f"test images, mean over runs. (a) and (b) take "
        f"{ASCENT_STEPS} Adam steps for every impression by `loss.backward()` into all parameters "
        f"(an image is kept as it was at its target confidence, else nothing is forgotten), then "
        f"{EPOCHS} epochs of masked KL on the impressions in batches of {BATCH} through the whole "
        f"model, backbone frozen (the paper has 100; of 10 to 100 the fewest with our RA); "
        f"they are given the layers to train. All calls are run whole, nothing is scaled. "
        f"(c) is our schedule in plain torch, without the package "
        f"(`examples/unlearn_in_plain_torch.py`): autograd `kl_div`, Adam by hand, AdamW unfused, "
        f"float32, contiguous. Peak MB: growth of a fresh process over its size before the call, "
        f"Linux's high-water mark set back after a small warm-up call, median of 3; (a) and (b) "
        f"with 3 ascent steps, since more need no more memory.",
    ]
    for report in reports:
        lines += tables(report)
    lines += ["", "## Bars", ""]
    lines += [line for report in reports if report.case.bars for line in verdicts(report)]
    (RESULTS / "cpu_unlearn.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = {case.model: case for case in CASES}
    parser.add_argument("models", nargs="*", help=", ".join(known))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--slow-runs", type=int, default=2, help="of (b) and the compiled tail")
    parser.add_argument("--memory", metavar="ROW", help="print the peak growth of one call")
    arguments = parser.parse_args()
    if wrong := set(arguments.models) - set(known):
        parser.error(f"no model {sorted(wrong)}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    chosen = [known[name] for name in arguments.models or known]
    if arguments.memory:
        print_peak_growth(chosen[0], arguments.memory)
        return
    reports: list[Report] = []
    for case in chosen:
        reports.append(measure(case, arguments.runs, arguments.slow_runs))
        write(reports)  # after each model: an interrupted run keeps what it has
    print((RESULTS / "cpu_unlearn.md").read_text())


if __name__ == "__main__":
    main()
