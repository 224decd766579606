"""The command ``zsu-fast``: demo, plan, unlearn, apply, ledger, evaluate, audit, doctor."""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from ..errors import ArgumentError, LedgerError, ZsuFastError
from ..evaluation.accuracy import Evaluation, evaluate as measure
from ..evaluation.audit import audit as run_audit
from ..evaluation.report.page import write_report
from ..models import checkpoint
from ..models.delta import apply_delta, save_delta
from ..models.infer_spec import resolve_spec
from ..models.input_spec import InputSpec
from ..models.loading import load_model
from ..models.parameters import weights_hash
from ..options import paper_preset
from ..planning.plan import plan as make_plan
from ..provenance import ledger as ledgers
from ..runtime import distributed
from ..runtime.accelerators import ACCELERATORS
from ..runtime.doctor import doctor as examine, render
from ..unlearner import ZeroShotUnlearner
from .audit import check_report, class_names, print_audit, report_run
from .demo import mnist_test, run as run_demo

app = typer.Typer(
    name="zsu-fast",
    help="Make a trained image classifier forget classes, without any training data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
ledger_app = typer.Typer(help="The ledger of requests to forget.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")
_MODEL_HELP = (
    "A zoo name (lenet5, karpathynet, resnet20_cifar, ...), a torchvision or timm name "
    "(torchvision:resnet50, timm:...), hf:folder (transformers), or package.module:factory."
)
_WEIGHTS_HELP = (
    "A safetensors file or torch checkpoint of plain tensors; 'pretrained' lets torchvision or "
    "timm download theirs."
)
_FORGET_HELP = "Classes: 1,2,3 or 0-99 or 0-49,390-439, or a file of them."
Model = Annotated[str, typer.Argument(help=_MODEL_HELP, show_default=False)]
Weights = Annotated[str | None, typer.Option(help=_WEIGHTS_HELP)]
Forget = Annotated[str, typer.Option(help=_FORGET_HELP, show_default=False)]
Classes = Annotated[int | None, typer.Option(help="Logits of a torchvision or timm model.")]
Shape = Annotated[str | None, typer.Option(help="Channels,height,width, such as 3,224,224.")]
Mean = Annotated[str | None, typer.Option(help="Per-channel mean of pixels in 0..1.")]
Std = Annotated[str | None, typer.Option(help="Per-channel std of the same.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Everything random depends on it alone.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
Report = Annotated[
    Path | None,
    typer.Option(help="Write an HTML report here, and its numbers as .json beside it."),
]
Tail = Annotated[str, typer.Option(help="auto, last, a module's name, or a number of last layers.")]
PerClass = Annotated[
    int | None, typer.Option(help="4 or more; else 32, or fewer for many classes.")
]
RetainSample = Annotated[
    int | None,
    typer.Option(
        help="Make impressions of so many retained classes; else of all, or of more than 4,096 "
        "for 1,024."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for model, record, report.")] = Path(
        "zsu-fast-demo"
    ),
    seed: Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """A LeNet5 forgets the digits 1, 2, 3, 4; offline, judged on 2,000 real images."""
    with _errors(as_json):
        rows, facts = run_demo(out, seed=seed, force=force, progress=_progress(as_json))
        if as_json:
            table = [{"name": r.name, "seconds": r.seconds, **r.evaluation.to_dict()} for r in rows]
            _print_json({"rows": table, **facts})
            return
        console = Console()
        console.print(
            _table(
                "LeNet5 on MNIST, forgetting 1, 2, 3, 4",
                [(r.name, r.evaluation, r.seconds) for r in rows],
            )
        )
        record = facts["record"]
        console.print(_count_line(rows[0].evaluation))
        console.print(f"Tail: {record['split']['at']} ({record['split']['reason']}).")
        console.print(_level(record))
        for sentence in facts["verdict"]:
            console.print(sentence, highlight=False)
        for what, path in facts["written"].items():
            console.print(f"{what}: {path}", soft_wrap=True, highlight=False)


@app.command()
def plan(
    model: Model,
    forget: Forget,
    hardware: Annotated[
        str | None,
        typer.Option(help=f"A card that is not here: {', '.join(ACCELERATORS)}; on paper."),
    ] = None,
    within: Annotated[
        float | None, typer.Option(help="Seconds the run may take: how many GPUs does it need?")
    ] = None,
    weights: Weights = None,
    tail: Tail = "auto",
    impressions_per_class: PerClass = None,
    retain_sample: RetainSample = None,
    classes: Classes = None,
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Says what unlearning will cost: seconds, peak memory, GPUs. Takes some seconds itself."""
    with _errors(as_json):
        expected = make_plan(
            load_model(model, weights, classes),
            parse_classes(forget),
            hardware=hardware,
            within=within,
            tail=_tail(tail),
            impressions_per_class=impressions_per_class,
            retain_sample=retain_sample,
            **_images(input_shape, mean, std),
            seed=seed,
            device=device,
        )
        if as_json:
            _print_json(expected.to_dict())
            return
        typer.echo(expected.render())


@app.command()
def unlearn(
    model: Model,
    forget: Forget,
    out: Annotated[
        Path | None, typer.Option(help=".safetensors, .pt or .pth to write.", show_default=False)
    ] = None,
    weights: Weights = None,
    delta: Annotated[Path | None, typer.Option(help="Write what changed, for `apply`.")] = None,
    forgotten: Annotated[
        str | None,
        typer.Option(help="Classes forgotten before, as for --forget; else the ledger's."),
    ] = None,
    ledger: Annotated[Path | None, typer.Option(help="Ledger to add this request to.")] = None,
    request: Annotated[str | None, typer.Option(help="The request's id in the ledger.")] = None,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Not the result of the ledger's last entry.")
    ] = False,
    record: Annotated[Path | None, typer.Option(help="Write the run's record (JSON).")] = None,
    report: Report = None,
    report_data: Annotated[
        str | None, typer.Option(help="Labelled images for the report alone, as for evaluate.")
    ] = None,
    tail: Tail = "auto",
    depth: Annotated[
        str, typer.Option(help="output, or deep: the features forget too, at a cost of RA.")
    ] = "output",
    objective: Annotated[str, typer.Option(help="masked or differential.")] = "masked",
    paper: Annotated[bool, typer.Option("--paper", help="The published recipe.")] = False,
    impressions_per_class: PerClass = None,
    retain_sample: RetainSample = None,
    classes: Classes = None,
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Forgets classes of a model and writes the new weights, or what changed of them.

    Under torchrun all processes make the impressions together.
    """
    with (
        _errors(as_json),
        distributed.launched(device) as ranks,
        _errors(as_json, quiet=not ranks.is_main),
        ranks.all_or_none(),
    ):
        if out is None and delta is None:
            raise ArgumentError("out", "neither --out nor --delta was given", "Name a file.")
        outputs = [path for path in (out, delta, record) if path is not None]
        if ranks.is_main:
            for path in outputs:
                checkpoint.check_writable(path, force)
            check_report(report, force)
        loaded = load_model(model, weights, classes)
        original = copy.deepcopy(loaded) if report is not None and ranks.is_main else loaded
        before = None if forgotten is None else parse_classes(forgotten)
        book = (
            None
            if ledger is None or not ranks.is_main
            else ledgers.Ledger(ledger, request, other_base)
        )
        if book is not None:
            book.check(weights_hash(loaded))
            before = book.forgotten() if before is None else before
        before = ranks.broadcast_object(before)
        options: dict[str, Any] = {"tail": _tail(tail), "depth": depth, "objective": objective}
        if paper:
            options |= paper_preset()
        run = ZeroShotUnlearner(
            loaded,
            parse_classes(forget),
            forgotten=before,
            **options,
            impressions_per_class=impressions_per_class,
            retain_sample=retain_sample,
            **_images(input_shape, mean, std),
            seed=seed,
            device=device,
            inplace=delta is None,
            progress=_progress(as_json),
        )
        result = run.run()
        if not ranks.is_main:
            return
        facts = run.record.to_dict()
        hashes = {k: facts[k] for k in ("weights_before", "weights_after")}
        metadata = {"zsu_fast.forget": json.dumps(run.forget), **hashes}
        if out is not None:
            checkpoint.save_weights(out, result, metadata, force)
        if delta is not None:
            save_delta(loaded, result, delta, force)
        if record is not None:
            content = run.record.to_json().encode()
            checkpoint.write_atomically(record, lambda file: file.write(content), force)
        verdict: list[str] = []
        if report is not None:
            seen = None if report_data is None else read_images(report_data, run.spec)
            progress = _progress(as_json)
            verdict = report_run(report, original, run, result, seen, force, progress).verdict
        entry = None
        if book is not None:
            try:
                entry = book.append(run.record)
            except BaseException:  # no result without its entry
                for path in outputs:
                    path.unlink(missing_ok=True)
                raise
        if as_json:
            told: dict[str, Any] = {
                "out": None if out is None else str(out),
                "record": facts,
                "verdict": verdict,
            }
            if delta is not None:
                told["delta"] = str(delta)
            if entry is not None:
                told["ledger"] = {"request": entry["request"], "head": entry["hash"]}
            _print_json(told)
            return
        console = Console()
        best, total = facts["fit"]["best"], facts["timings"]["total"]
        console.print(f"Forgot {len(run.forget)} of {run.classes} classes in {total:.1f} s.")
        console.print(
            f"Impressions: {facts['impressions']['count']}, "
            f"{100 * facts['impressions']['hit_rate']:.1f} % reached their confidence."
        )
        console.print(f"Tail: {facts['split']['at']} ({facts['split']['reason']}).")
        console.print(
            f"Held-out rows still answered with a forgotten class: {100 * best['leak']:.2f} %; "
            f"{100 * best['agreement']:.2f} % of the others as the masked original answers."
        )
        console.print(_level(facts))
        for sentence in verdict:
            console.print(sentence, highlight=False)
        if entry is not None:
            console.print(f"Request {entry['request']}, ledger head {entry['hash']}.")
        written = ", ".join(str(path) for path in (*outputs, report) if path)
        console.print(f"Written: {written}", soft_wrap=True, highlight=False)


@app.command()
def apply(
    model: Model,
    delta: Annotated[Path, typer.Argument(help="What --delta wrote.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help=".safetensors, .pt or .pth to write.", show_default=False)
    ],
    weights: Weights = None,
    classes: Classes = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Puts a delta into the weights that it was made from: the unlearned model, bit for bit."""
    with _errors(as_json):
        checkpoint.check_writable(out, force)
        base = load_model(model, weights, classes)
        result = apply_delta(base, delta)
        hashes = {"weights_before": weights_hash(base), "weights_after": weights_hash(result)}
        checkpoint.save_weights(out, result, hashes, force)
        if as_json:
            _print_json({"out": str(out), **hashes})
            return
        Console().print(f"Written: {out}", soft_wrap=True, highlight=False)


@ledger_app.command("verify")
def ledger_verify(
    path: Annotated[Path, typer.Argument(help="The ledger.", show_default=False)],
    head: Annotated[
        str | None, typer.Option(help="Hash of its last entry, kept elsewhere: finds cut-off ends.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"Model in use. {_MODEL_HELP}")] = None,
    weights: Weights = None,
    classes: Classes = None,
    as_json: AsJson = False,
) -> None:
    """Checks every entry and the chain; exit code 2 where something is wrong."""
    with _errors(as_json):
        used = None if model is None else load_model(model, weights, classes)
        problems = ledgers.verify(path, head, used)
        if problems:
            raise LedgerError(f"ledger: {path} is not what was written: {'; '.join(problems)}.")
        book = ledgers.Ledger(path)
        entries = book.entries()
        if as_json:
            told = {"entries": len(entries), "head": book.head, "forgotten": book.forgotten()}
            _print_json(told)
            return
        typer.echo(f"{len(entries)} entries, all intact. Head: {book.head}")


@ledger_app.command("show")
def ledger_show(
    path: Annotated[Path, typer.Argument(help="The ledger.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Lists the requests."""
    with _errors(as_json):
        entries = ledgers.Ledger(path).entries()
        if as_json:
            _print_json(entries)
            return
        table = Table(title=_escape(str(path)))
        for name in (
            "number",
            "request",
            "time",
            "forget",
            "forgotten before",
            "weights",
            "leak %",
        ):
            table.add_column(name)
        for e in entries:
            leak = e["metrics"].get("leak")
            table.add_row(
                str(e["number"]),
                _escape(e["request"]),
                _escape(e["time"]),
                _few(e["forget"]),
                _few(e["forgotten"]),
                f"{_escape(e['hash_before'][:8])} to {_escape(e['hash_after'][:8])}",
                f"{100 * leak:.2f}" if isinstance(leak, float) else "-",
            )
        Console().print(table)


@app.command()
def audit(
    model: Model,
    unlearned: Annotated[
        str, typer.Option(help="The unlearned model's weights file.", show_default=False)
    ],
    forget: Forget,
    weights: Weights = None,
    data: Annotated[
        str | None, typer.Option(help="Labelled images not trained on, as for evaluate.")
    ] = None,
    train_data: Annotated[
        str | None, typer.Option(help="Labelled images that were trained on.")
    ] = None,
    golden: Annotated[
        str | None, typer.Option(help="Weights of a model trained without the classes.")
    ] = None,
    report: Report = None,
    shots: Annotated[int, typer.Option(help="Images a class that relearning may use.")] = 500,
    relearn_steps: Annotated[
        int | None, typer.Option(help="Most steps of relearning; 0 leaves it out.")
    ] = None,
    classes: Classes = None,
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Says what an unlearned model has forgotten, and what it only hides."""
    with _errors(as_json):
        check_report(report, force)
        original = load_model(model, weights, classes)
        shaped = _images(input_shape, mean, std)
        spec = resolve_spec(original, **shaped)
        images = None if data is None else read_images(data, spec)
        result = run_audit(
            original,
            load_model(model, unlearned, classes),
            parse_classes(forget),
            images,
            None if golden is None else load_model(model, golden, classes),
            train_data=None if train_data is None else read_images(train_data, spec),
            shots=shots,
            relearn_steps=relearn_steps,
            **shaped,
            seed=seed,
            device=device,
            progress=_progress(as_json),
        )
        if report is not None:
            write_report(
                report,
                result,
                title=f"{model}: what was forgotten",
                names=class_names(images),
                force=force,
            )
        if as_json:
            _print_json(result.to_dict())
            return
        console = Console()
        print_audit(console, result)
        if report is not None:
            console.print(f"Written: {report}", soft_wrap=True, highlight=False)


@app.command()
def evaluate(
    model: Model,
    forget: Forget,
    data: Annotated[
        str,
        typer.Option(
            help="A folder with one sub-folder a class, an .npz with uint8 'images' [N, C, H, W] "
            "and 'labels', or 'demo' (2,000 MNIST images).",
            show_default=False,
        ),
    ],
    weights: Weights = None,
    classes: Classes = None,
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measures FA, RA and overall accuracy on labelled images."""
    with _errors(as_json):
        loaded = load_model(model, weights, classes)
        spec = resolve_spec(loaded, **_images(input_shape, mean, std))
        if device is not None:
            loaded = loaded.to(device)
        started = time.perf_counter()
        result = measure(loaded, read_images(data, spec), parse_classes(forget))
        if as_json:
            _print_json(result.to_dict())
            return
        console = Console()
        console.print(_table(model, [(model, result, time.perf_counter() - started)]))
        console.print(_count_line(result))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Says what this installation has, and what it lacks and why."""
    facts = examine()
    if as_json:
        _print_json(facts)
        return
    typer.echo(render(facts))


def parse_classes(text: str) -> list[int]:
    """Class indices from "1,2,3", "0-99", a mix of both, or a file that holds such text.

    Raises:
        ArgumentError: anything else.
    """
    path = Path(text)
    content = path.read_text() if path.is_file() else text
    chosen: list[int] = []
    for part in content.replace(",", " ").split():
        low, dash, high = part.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()) or (dash and int(high) < int(low)):
            raise ArgumentError(
                "forget",
                f"got {text!r}, in which {part!r} is neither a class nor a range",
                "Pass 1,2,3 or 0-99, or a file that exists and holds such text.",
            )
        chosen.extend(range(int(low), int(high or low) + 1))
    return chosen


def read_images(source: str, spec: InputSpec) -> Any:
    """Labelled images for `evaluate`: "demo", an .npz, or a folder with a sub-folder a class.

    Raises:
        ArgumentError: there is nothing of the kind.
    """
    if source == "demo":
        return mnist_test()
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                images, labels = (torch.from_numpy(file[k]) for k in ("images", "labels"))
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise ArgumentError(
                "data", f"{source} can't be read ({error})", "Store 'images' and 'labels'."
            ) from error
        return spec.normalise(images), labels.long()
    if path.is_dir():
        return image_folder(path, spec)
    raise ArgumentError(
        "data", f"got {source!r}, neither a folder nor an .npz file", "Pass one, or 'demo'."
    )


def image_folder(path: Path, spec: InputSpec, classes: int | None = None, workers: int = 0) -> Any:
    """Labelled images of a folder with one sub-folder a class, numbered in sorted order.

    Resized, cropped and normalised as ``spec`` says, in batches of 64.

    Args:
        path: the folder.
        spec: of the model's images.
        classes: how many sub-folders there have to be; None for any number.
        workers: processes that read images.

    Raises:
        ArgumentError: no sub-folders, another number of them, or torchvision is missing.
    """
    transform = spec.transform()
    from torchvision import datasets

    if not path.is_dir():
        raise ArgumentError("data", f"{path} is not a folder", "Name one that exists.")
    folders = [entry for entry in path.iterdir() if entry.is_dir()]
    if not folders or (classes is not None and len(folders) != classes):
        files = sum(entry.is_file() for entry in path.iterdir())
        raise ArgumentError(
            "data",
            f"{path} holds {len(folders)} folders and {files} files",
            f"Make one sub-folder a class{'' if classes is None else f', {classes} of them'}: "
            "folders are numbered in sorted order, and ImageNet's are named by WordNet id. "
            "Images that lie side by side, as in ILSVRC2012_img_val.tar, have to be moved into "
            "their classes' folders first.",
        )
    images = datasets.ImageFolder(str(path), transform, allow_empty=True)
    if not len(images):
        raise ArgumentError("data", f"there is no image in {path}", "Put some into its folders.")
    return torch.utils.data.DataLoader(images, batch_size=64, num_workers=workers)


def main() -> None:
    """The console script."""
    app()


@contextmanager
def _errors(as_json: bool, quiet: bool = False) -> Iterator[None]:
    """Turns the package's errors into one line on stderr and exit code 2; Ctrl-C into 130.

    ``quiet`` prints neither these nor warnings: another rank does.
    """
    console = Console(stderr=True, quiet=quiet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except ZsuFastError as error:
            if as_json and not quiet:
                _print_json({"error": str(error), "type": type(error).__name__})
            else:
                console.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            console.print("interrupted; nothing was changed")
            raise typer.Exit(130) from error
        finally:
            for warning in caught:
                console.print(f"[yellow]warning:[/] {_escape(str(warning.message))}")


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _few(classes: list[int]) -> str:
    shown = ", ".join(map(str, classes[:12]))
    return shown + (f" and {len(classes) - 12} more" if len(classes) > 12 else "")


def _progress(as_json: bool) -> bool | None:
    return False if as_json else None


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _table(title: str, rows: list[tuple[str, Evaluation, float | None]]) -> Table:
    table = Table(title=title)
    table.add_column("model")
    for head in ("FA %", "RA %", "overall %", "seconds"):
        table.add_column(head, justify="right")
    for name, result, seconds in rows:
        figures = (result.forget_accuracy, result.retain_accuracy, result.overall_accuracy)
        table.add_row(
            name,
            *["-" if f is None else f"{f:.2f}" for f in figures],
            "-" if seconds is None else f"{seconds:.2f}",
        )
    return table


def _count_line(result: Evaluation) -> str:
    total = result.forget_count + result.retain_count
    return (
        f"FA: of {result.forget_count} images of forgotten classes; RA: of {result.retain_count} "
        f"others; overall: of all {total}."
    )


def _level(record: dict[str, Any]) -> str:
    if record["split"]["output_level"]:
        return (
            "Output-level forgetting: only the last layer was trained, so the features of the "
            "forgotten classes are still inside."
        )
    return f"Trained: {', '.join(record['split']['trained'])}."


def _tail(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def _images(input_shape: str | None, mean: str | None, std: str | None) -> dict[str, Any]:
    """What the user says of the images, as arguments."""
    return {
        "input_shape": _numbers("input_shape", input_shape, int),
        "mean": _numbers("mean", mean, float),
        "std": _numbers("std", std, float),
    }


def _numbers(name: str, text: str | None, kind: type[int] | type[float]) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.replace("x", ",").split(",")]
    except ValueError as error:
        raise ArgumentError(
            name, f"got {text!r} ({error})", "Pass numbers with commas between."
        ) from error
