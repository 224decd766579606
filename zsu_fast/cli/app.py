"""The Typer app ``zsu-fast`` and its short commands."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ArgumentError, LedgerError, shorten
from ..evaluation.accuracy import evaluate as measure
from ..evaluation.encoder_evaluation import EncoderEvaluation
from ..evaluation.multi_label import MultiLabelEvaluation
from ..models import checkpoint
from ..models.compact_file import compact_metadata, file_compaction
from ..models.delta import apply_delta
from ..models.embedding_classifier import deliverable
from ..models.gallery import Gallery
from ..models.infer_spec import resolve_spec
from ..models.loading import load_model
from ..models.parameters import weights_hash
from ..planning.doctor import doctor as examine, render
from ..planning.plan import plan as make_plan
from ..provenance.ledger import Entry, Ledger, verify as find_problems
from ..provenance.templates import matching
from ..runtime.accelerators import ACCELERATORS
from . import options, output
from .audit import audit
from .check import check
from .demo import run as run_demo
from .enroll import enroll
from .inputs import folder_order, labels_of, parse_classes, parse_tail, read_images
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
    seed: options.Seed = 0,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Unlearns the digits 1, 2, 3, 4 in a LeNet5, offline; tests it on 2,000 real images."""
    with output.report_errors(as_json):
        rows, facts = run_demo(out, seed=seed, force=force, progress=False if as_json else None)
        if as_json:
            table = [{"name": r.name, "seconds": r.seconds, **r.evaluation.to_dict()} for r in rows]
            output.print_json({"rows": table, **facts})
            return
        console = Console()
        output.print_accuracies(console, "LeNet5 on MNIST, forgetting 1, 2, 3, 4", rows)
        output.print_split(console, facts["record"])
        output.print_level(console, facts["record"])
        output.print_sentences(console, facts["verdict"])
        for name, path in facts["written"].items():
            console.print(f"{name}: {path}", soft_wrap=True, highlight=False)


@app.command()
@options.expand_options
def plan(
    model: options.ModelOptions,
    forget: options.Forget,
    impressions: options.ImpressionOptions,
    images: options.ImageOptions,
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
    tail: options.Tail = "auto",
    depth: Annotated[
        str | None, typer.Option(help="The level to plan; only output can be, the default.")
    ] = None,
    space: options.Space = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Estimates what unlearning will cost: seconds, peak memory, GPUs. Takes some seconds."""
    with output.report_errors(as_json):
        expected = make_plan(
            model.load(), parse_classes(forget), hardware=hardware, within=within,
            tail=parse_tail(tail), depth=depth, space=space, steps=steps,
            **asdict(impressions), **images.arguments(), output=images.choice, seed=seed,
            device=device,
        )  # fmt: skip
        if as_json:
            output.print_json(expected.to_dict())
        else:
            typer.echo(expected.render())


app.command()(enroll)
app.command()(unlearn)


@app.command()
@options.expand_options
def apply(
    model: options.ModelOptions,
    delta: Annotated[
        Path, typer.Argument(help="A file written by unlearn --delta.", show_default=False)
    ],
    out: Annotated[Path, options.OUT],
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Applies a delta to the weights it was computed from: the unlearned model, bit for bit."""
    with output.report_errors(as_json):
        checkpoint.check_ending(out)
        checkpoint.check_writable(out, force)
        base = deliverable(model.load())
        result = apply_delta(base, delta)
        hashes = {"weights_before": weights_hash(base), "weights_after": weights_hash(result)}
        metadata = hashes | compact_metadata(file_compaction(model.weights))
        checkpoint.save_weights(out, result, metadata, force)
        if as_json:
            output.print_json({"out": str(out), **hashes})
        else:
            output.print_written(Console(), [out])


app.command()(check)
app.command()(audit)


@app.command()
@options.expand_options
def evaluate(
    model: options.ModelOptions,
    forget: options.Forget,
    data: Annotated[
        str,
        typer.Option(
            help="A folder with one sub-folder per class, named by its number, its name or its "
            "WordNet id; an .npz file with uint8 'images' [N, C, H, W] and 'labels'; or 'demo' "
            "(2,000 MNIST images).",
            show_default=False,
        ),
    ],
    images: options.ImageOptions,
    class_names: options.ClassNames = None,
    multi_label: options.MultiLabel = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Measures FA, RA and overall accuracy on labelled images."""
    with output.report_errors(as_json):
        loaded = model.load()
        spec = resolve_spec(loaded, **images.arguments())
        if device is not None:
            loaded = loaded.to(device)
        started = time.perf_counter()
        labelled = read_images(data, spec)
        names = folder_order(class_names, labelled)
        labels = labels_of(names, loaded)
        result = measure(
            loaded, labelled, parse_classes(forget, labels), class_names=names,
            output=images.choice, multi_label=multi_label,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        if as_json:
            output.print_json(result.to_dict())
        elif isinstance(result, EncoderEvaluation):
            output.print_encoder(Console(), model.model, result)
        elif isinstance(result, MultiLabelEvaluation):
            output.print_multi_label(Console(), model.model, result)
        else:
            console = Console()
            output.print_accuracies(console, model.model, [(model.model, result, seconds)])
            output.print_labels(console, "Forgotten", result.labels)
            output.print_data_classes(console, result.data_classes, labels)


@app.command()
def doctor(
    as_json: options.AsJson = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Cache of runs: shows how they computed the ascent on this machine."),
    ] = None,
) -> None:
    """Shows which parts of this installation are available, and why the others are not."""
    with output.report_errors(as_json):
        facts = examine(cache)
        if as_json:
            output.print_json(facts)
        else:
            typer.echo(render(facts))


ledger_app = typer.Typer(help="The ledger of requests to forget.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")
LedgerFile = Annotated[Path, typer.Argument(help="The ledger.", show_default=False)]


@ledger_app.command()
def verify(
    path: LedgerFile,
    head: Annotated[
        str | None,
        typer.Option(
            help="Hash of the last entry, stored elsewhere: reveals whether entries were cut off."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"The model in use. {options.MODEL_HELP}")
    ] = None,
    weights: options.Weights = None,
    classes: options.Classes = None,
    gallery: options.GalleryFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Checks every entry and the chain; exits with 2 if something is wrong."""
    with output.report_errors(as_json):
        alone = {"weights": weights, "classes": classes, "gallery": gallery}
        if model is None and (given := [name for name, v in alone.items() if v is not None]):
            raise ArgumentError(given[0], "given without --model", "Name the model too.")
        encoder = gallery is not None
        used = None if model is None else load_model(model, weights, classes, encoder)
        problems = find_problems(path, head, used)
        if problems:
            raise LedgerError(f"ledger: {path} is not what was written: {'; '.join(problems)}.")
        ledger = Ledger(path)
        entries = ledger.entries()
        if as_json:
            facts = {"entries": len(entries), "head": ledger.head, "forgotten": ledger.forgotten()}
            output.print_json(facts)
        else:
            typer.echo(f"{len(entries)} entries, all intact. Head: {ledger.head}")


@ledger_app.command()
def show(path: LedgerFile, as_json: options.AsJson = False) -> None:
    """Lists the requests."""
    with output.report_errors(as_json):
        if not path.is_file():
            raise LedgerError(f"ledger: {path} is not a file. Name a ledger that exists.")
        entries = Ledger(path).entries()
        if as_json:
            output.print_json(entries)
        else:
            Console().print(_table(path, entries))


@ledger_app.command()
def find(
    path: LedgerFile,
    gallery: Annotated[
        Path, typer.Option(help="A gallery, written by enroll.", show_default=False)
    ],
    as_json: options.AsJson = False,
) -> None:
    """Lists the requests to forget identities of a gallery, whose templates identify them."""
    with output.report_errors(as_json):
        if not path.is_file():
            raise LedgerError(f"ledger: {path} is not a file. Name a ledger that exists.")
        people = Gallery.load(gallery)
        found = []
        for entry in Ledger(path).entries():
            names = [people.names[c] for c in matching(entry["metrics"], people)]
            if names:
                found.append({
                    "request": entry["request"], "time": entry["time"], "identities": names,
                })  # fmt: skip
        if as_json:
            output.print_json(found)
            return
        for row in found:
            typer.echo(f"{row['request']} ({row['time']}): {', '.join(row['identities'])}")
        if not found:
            typer.echo("No request concerns an identity of this gallery.")


def _table(path: Path, entries: list[Entry]) -> Table:
    names = ("number", "request", "time", "forget", "forgotten before", "weights", "leak %")
    table = Table(*names, title=output.escape(str(path)))
    for entry in entries:
        leak = entry["metrics"].get("leak")
        before, after = (output.escape(entry[key][:8]) for key in ("hash_before", "hash_after"))
        table.add_row(
            str(entry["number"]),
            output.escape(entry["request"]),
            output.escape(entry["time"]),
            output.escape(shorten(_named(entry), 12)),
            shorten(entry["forgotten"], 12),
            f"{before} to {after}",
            f"{100 * leak:.2f}" if isinstance(leak, float) else "-",
        )
    return table


def _named(entry: Entry) -> list[str]:
    """The classes of a request, with their names if the ledger has them."""
    labels = entry["metrics"].get("labels")
    named = labels if isinstance(labels, dict) else {}
    return [f"{c} ({named[str(c)]})" if str(c) in named else str(c) for c in entry["forget"]]


def main() -> None:
    """The console script."""
    app()
