"""Prints results, warnings and errors: text for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ..errors import ZsuFastError, shorten
from ..evaluation.accuracy import Evaluation
from ..evaluation.encoder_evaluation import PARTS, EncoderEvaluation
from ..evaluation.multi_label import MultiLabelEvaluation
from ..models.labels import Labels


@contextmanager
def report_errors(as_json: bool, quiet: bool = False) -> Iterator[None]:
    """Turns the package's errors into one line on stderr and exit code 2, Ctrl-C into 130.

    Args:
        as_json: print errors as JSON on stdout instead.
        quiet: print neither errors nor warnings, because another rank does.
    """
    console = Console(stderr=True, quiet=quiet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except ZsuFastError as error:
            if as_json and not quiet:
                print_json({"error": str(error), "type": type(error).__name__})
            else:
                console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            console.print("interrupted; nothing was changed")
            raise typer.Exit(130) from error
        finally:
            for text in dict.fromkeys(str(warning.message) for warning in caught):
                console.print(f"[yellow]warning:[/] {escape(text)}")


def escape(text: str) -> str:
    """Protects square brackets from rich's markup."""
    return text.replace("[", r"\[")


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_sentences(console: Console, sentences: Iterable[str]) -> None:
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)


def print_written(console: Console, paths: Iterable[Path]) -> None:
    console.print("Written:", ", ".join(map(str, paths)), soft_wrap=True, highlight=False)


def print_split(console: Console, record: dict[str, Any]) -> None:
    console.print(f"Tail: {record['split']['at']} ({record['split']['reason']}).")


def print_level(console: Console, record: dict[str, Any]) -> None:
    """Says at which level the model forgot, and which layers were trained."""
    level = record["depth"].get("level", "output")
    trained = ", ".join(record["split"]["trained"])
    console.print(f"Level: {level}. Trained: {trained}.", soft_wrap=True, highlight=False)
    if record["split"]["output_level"]:
        console.print(
            "Only the last layer was trained, so the features of the forgotten classes are still "
            "inside."
        )


def print_labels(console: Console, words: str, labels: dict[str, str]) -> None:
    """Prints classes with their names, if there are any."""
    if labels:
        shown = shorten((f"{index} ({name})" for index, name in labels.items()), 12)
        console.print(f"{words}: {shown}.", markup=False, highlight=False)


def print_data_classes(
    console: Console, classes: dict[str, int], labels: Labels | None, most: int = 40
) -> None:
    """Prints which class of the model each class of the data is; all of them with --json."""
    if not classes:
        return
    names = {} if labels is None else labels.named(classes.values())
    pairs = (
        f"{n} = {i}{f' ({names[str(i)]})' if str(i) in names else ''}"
        for n, i in sorted(classes.items(), key=lambda pair: pair[1])
    )
    console.print(f"Data: {shorten(pairs, most)}.", markup=False, highlight=False)


def print_accuracies(
    console: Console, title: str, rows: Sequence[tuple[str, Evaluation, float | None]]
) -> None:
    """Prints a table of (model, its accuracies, seconds or None), and what it counts."""
    numbers = [Column(name, justify="right") for name in ("FA %", "RA %", "overall %", "seconds")]
    table = Table("model", *numbers, title=title)
    for name, result, seconds in rows:
        figures = (
            result.forget_accuracy, result.retain_accuracy, result.overall_accuracy, seconds,
        )  # fmt: skip
        table.add_row(name, *["-" if f is None else f"{f:.2f}" for f in figures])
    console.print(table)
    counts = rows[0][1]
    console.print(
        f"FA: accuracy on {counts.forget_count} images of forgotten classes; RA: on "
        f"{counts.retain_count} others; overall: on all "
        f"{counts.forget_count + counts.retain_count}."
    )


def print_multi_label(console: Console, title: str, result: MultiLabelEvaluation) -> None:
    """Prints a table of the forgotten and the retained classes of a multi-label model."""
    columns = ("average precision %", "predicted %", "F1 %", "chance %", "images")
    table = Table("class", *[Column(c, justify="right") for c in columns], title=title)
    for c, scores in result.per_class.items():
        name = f"{c}, forgotten" if c in result.forget else str(c)
        figures = (scores.average_precision, scores.rate, scores.f1, scores.prevalence)
        cells = ["-" if f is None else f"{f:.2f}" for f in figures]
        table.add_row(name, *cells, str(scores.count))
    console.print(table)
    console.print(str(result), markup=False, highlight=False)


def print_encoder(console: Console, title: str, result: EncoderEvaluation) -> None:
    """Prints the rates of an encoder for forgotten and other identities, side by side."""
    columns = [Column(part, justify="right") for part in ("forgotten", "others")]
    table = Table("", *columns, title=title)
    kinds = {"rank1_{}": "rank-1"}
    for far, words in (("1e2", "1 %"), ("1e3", "0.1 %")):
        kinds[f"identified_{{}}_{far}"] = f"identified at FAR {words}"
        kinds[f"tar_{{}}_{far}"] = f"TAR at FAR {words}"
    for kind, words in kinds.items():
        cells = (result.rates.get(kind.format(part)) for part in PARTS)
        table.add_row(words, *["-" if cell is None else f"{cell:.2f}" for cell in cells])
    accused, strangers = (result.rates.get(f"{kind}_1e2") for kind in ("accused", "strangers"))
    table.add_row("taken for another at FAR 1 %", *[
        "-" if cell is None else f"{cell:.2f}" for cell in (accused, strangers)
    ])  # fmt: skip
    table.add_row("images", str(result.forget_count), str(result.retain_count))
    console.print(table)
    console.print(
        "Per cent of the images. FAR: the false-accept rate of the retained identities, which sets "
        "the threshold. Taken for another: by a retained identity other than their own."
    )
    for reason in dict.fromkeys(result.missing.values()):
        console.print(f"No value (-): {reason}.", markup=False, highlight=False)
    print_labels(console, "Forgotten", result.labels)
