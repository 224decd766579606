"""The Typer app ``zsu-fast`` and its short commands."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..evaluation.accuracy import evaluate as measure
from ..models import checkpoint
from ..models.delta import apply_delta
from ..models.infer_spec import resolve_spec
from ..models.parameters import weights_hash
from ..planning.plan import plan as make_plan
from ..runtime.accelerators import ACCELERATORS
from ..runtime.doctor import doctor as examine, render
from .audit import audit
from .demo import run as run_demo
from .inputs import parse_classes, parse_tail, read_images
from .ledger import app as ledger_app
from .options import (
    AsJson,
    Device,
    Force,
    Forget,
    ImageOptions,
    ImpressionOptions,
    ModelOptions,
    Out,
    Seed,
    Tail,
    expand_options,
)
from .output import (
    print_accuracies,
    print_json,
    print_level,
    print_sentences,
    print_split,
    print_written,
    progress_bar,
    report_errors,
)
from .unlearn import unlearn

app = typer.Typer(
    name="zsu-fast",
    help="Make a trained image classifier forget classes, without any training data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the model, the record and the report.")
    ] = Path("zsu-fast-demo"),
    seed: Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Unlearns the digits 1, 2, 3, 4 in a LeNet5, offline; tests it on 2,000 real images."""
    with report_errors(as_json):
        rows, facts = run_demo(out, seed=seed, force=force, progress=progress_bar(as_json))
        if as_json:
            table = [{"name": r.name, "seconds": r.seconds, **r.evaluation.to_dict()} for r in rows]
            print_json({"rows": table, **facts})
            return
        console = Console()
        print_accuracies(
            console,
            "LeNet5 on MNIST, forgetting 1, 2, 3, 4",
            [(r.name, r.evaluation, r.seconds) for r in rows],
        )
        print_split(console, facts["record"])
        print_level(console, facts["record"])
        print_sentences(console, facts["verdict"])
        for name, path in facts["written"].items():
            console.print(f"{name}: {path}", soft_wrap=True, highlight=False)


@app.command()
@expand_options
def plan(
    model: ModelOptions,
    forget: Forget,
    impressions: ImpressionOptions,
    images: ImageOptions,
    hardware: Annotated[
        str | None,
        typer.Option(
            help=f"Estimate on paper for a GPU you don't have: {', '.join(ACCELERATORS)}."
        ),
    ] = None,
    within: Annotated[
        float | None,
        typer.Option(help="Seconds the run may take; the plan says how many GPUs that needs."),
    ] = None,
    tail: Tail = "auto",
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Estimates what unlearning will cost: seconds, peak memory, GPUs. Takes some seconds."""
    with report_errors(as_json):
        expected = make_plan(
            model.load(),
            parse_classes(forget),
            hardware=hardware,
            within=within,
            tail=parse_tail(tail),
            **asdict(impressions),
            **images.arguments(),
            seed=seed,
            device=device,
        )
        if as_json:
            print_json(expected.to_dict())
        else:
            typer.echo(expected.render())


app.command()(unlearn)


@app.command()
@expand_options
def apply(
    model: ModelOptions,
    delta: Annotated[
        Path, typer.Argument(help="A file written by unlearn --delta.", show_default=False)
    ],
    out: Out,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Applies a delta to the weights it was computed from: the unlearned model, bit for bit."""
    with report_errors(as_json):
        checkpoint.check_writable(out, force)
        base = model.load()
        result = apply_delta(base, delta)
        hashes = {"weights_before": weights_hash(base), "weights_after": weights_hash(result)}
        checkpoint.save_weights(out, result, hashes, force)
        if as_json:
            print_json({"out": str(out), **hashes})
        else:
            print_written(Console(), [out])


app.command()(audit)


@app.command()
@expand_options
def evaluate(
    model: ModelOptions,
    forget: Forget,
    data: Annotated[
        str,
        typer.Option(
            help="A folder with one sub-folder per class, an .npz file with uint8 'images' "
            "[N, C, H, W] and 'labels', or 'demo' (2,000 MNIST images).",
            show_default=False,
        ),
    ],
    images: ImageOptions,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measures FA, RA and overall accuracy on labelled images."""
    with report_errors(as_json):
        loaded = model.load()
        spec = resolve_spec(loaded, **images.arguments())
        if device is not None:
            loaded = loaded.to(device)
        started = time.perf_counter()
        result = measure(loaded, read_images(data, spec), parse_classes(forget))
        seconds = time.perf_counter() - started
        if as_json:
            print_json(result.to_dict())
        else:
            print_accuracies(Console(), model.model, [(model.model, result, seconds)])


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Shows which parts of this installation are available, and why the others are not."""
    facts = examine()
    if as_json:
        print_json(facts)
    else:
        typer.echo(render(facts))


app.add_typer(ledger_app, name="ledger")


def main() -> None:
    """The console script."""
    app()
