"""The verdict on a result, measured without data: what was forgotten, how deeply, at what cost.

`Verdict.of_record` takes the figures of a run; `check` in `check.py` measures any model. Both use
the same limits, so a result that passes one is not a failure by definition of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import VerdictError, shorten
from ..training.deep.checks import LEAST_AGREEMENT

Level = Literal["deep", "output", "none"]

MOST_LEAK = 0.01  # of the held-out rows of forgotten classes
# The last layer alone can change without touching any retained answer, and by default does.
LEAST_OUTPUT_AGREEMENT = 0.98
# Deep forgetting aims at 10 %; the compact ViT ends at 10 % of inverted rows, 0 % of real images.
# Its agreement on scenes has the limit below which it fails.
MOST_UNMASK_LEAK = 0.15
LEAST_DEEP_AGREEMENT = LEAST_AGREEMENT
_UNKNOWN = (
    "the original recognises a forgotten class in none of the held-out rows, so it cannot be told "
    "whether the classes were forgotten. Pass more impressions_per_class, check input_shape, mean "
    "and std, or measure with evaluate()."
)
NOT_COVERED = "not covered: "  # how a record's warning about something that was left out starts


@dataclass(frozen=True)
class Verdict:
    """Whether a model forgot the classes, by figures that need no data.

    `str` gives it as text for people, `to_dict` as plain values. A pipeline asserts ``passed`` or
    calls `raise_for_status`.

    Attributes:
        level: "deep": the features forgot too; "output": only the outputs; "none": the classes are
            still recognised.
        asked: the level that was asked for; None for any.
        forgotten: indices of the classes that were to be forgotten, sorted.
        leak: share of the held-out rows of these classes that are assigned to one of them, 0..1;
            None if there is no such row, or if the original recognises none: then it can't be told
            whether they were forgotten.
        agreement: share of held-out rows of other classes whose answer is the original's with the
            forgotten classes masked, 0..1. After a deep run, the lower of the figures of its two
            stages.
        unmask_leak, unmask_agreement: the same with the original last layer put back; None if that
            was not measured.
        measured_on: the rows, in words.
        labels: names of forgotten classes by index, where known.
        not_covered: what the verdict, or the run, leaves out, in sentences.
        failures: what is below par, in sentences; it did not pass if there are any.
        warnings: what else the user should know, in sentences, after the failures.
        encoder: whether the model is an encoder, and its classes are identities of a gallery. Rows
            that no template accepts do not count as recognised then.
    """

    level: Level
    asked: Level | None
    forgotten: list[int]
    leak: float | None
    agreement: float
    unmask_leak: float | None = None
    unmask_agreement: float | None = None
    measured_on: str = ""
    labels: dict[int, str] = field(default_factory=dict)
    not_covered: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    encoder: bool = False

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Verdict:
        """The verdict of a finished run, from `Record.to_dict` or the record's JSON file."""
        depth, best = record["depth"], record["fit"]["best"]
        first = record["fit"]["history"][0]
        level: Level = depth.get("level", "output")
        leak, leak_before = (None if v is None else _leak(v) for v in (best, first))
        agreement = 0.0 if best is None else best["agreement"]
        unmask_leak = unmask_agreement = None
        if level == "deep":
            unmask_leak, unmask_agreement = (
                depth[name]["after"] for name in ("unmask_leak", "agreement")
            )
            agreement = min(agreement, unmask_agreement)
            leak_before = depth["unmask_leak"]["before"]  # of the features before they forgot
        elif record["split"]["output_level"]:  # with its last layer back, it is the original
            unmask_leak, unmask_agreement = leak_before, first["agreement"]
        names = {int(index): name for index, name in record.get("labels", {}).items()}
        least = LEAST_DEEP_AGREEMENT if level == "deep" else LEAST_OUTPUT_AGREEMENT
        if not leak_before:
            leak = None  # nothing was recognised that could be forgotten
        remedy = (
            f". Training ended: {record['fit']['stopped']}. Try objective='masked', another tail, "
            f"or more steps, and measure with evaluate()."
        )
        below = shortfalls(level, leak, agreement, least, unmask_leak)
        if record.get("gallery"):  # the templates are the original last layer
            below = shortfalls(level, leak, agreement, least, None, MOST_UNMASK_LEAK)
        failures = [text + remedy for text in below]
        if leak is None:
            failures.insert(0, _UNKNOWN)
        given = [w for w in record["warnings"] if w not in failures]
        left_out = [w.removeprefix(NOT_COVERED) for w in given if w.startswith(NOT_COVERED)]
        return cls(
            level, depth.get("depth"), list(record["forget"]), leak, agreement, unmask_leak,
            unmask_agreement, "held-out rows of the run", names, left_out, failures,
            [w for w in given if not w.startswith(NOT_COVERED)], bool(record.get("gallery")),
        )  # fmt: skip

    @property
    def passed(self) -> bool:
        """Whether the level that was asked for was reached and nothing is below par."""
        reached = self.level == "deep" or self.asked != "deep"
        told = self.leak is not None
        return told and self.level != "none" and reached and not self.failures

    @property
    def sentence(self) -> str:
        """The verdict in one plain sentence."""
        classes = self.class_names()
        if self.leak is None:
            return f"Cannot be told whether the model forgot {classes}."
        if self.level == "none":
            return f"Not forgotten: {self.leak:.0%} of the rows of {classes} are still recognised."
        where = "the outputs and the features" if self.level == "deep" else "the outputs only"
        where = "the embeddings" if self.encoder else where
        text = f"Forgotten in {where}: {classes}"
        if self.passed:
            return f"{text}."
        if self.failures:
            count = len(self.failures)
            return f"{text}, but {count} figure{'s are' if count > 1 else ' is'} below par."
        return f"{text}, but deep forgetting was asked for."

    def class_names(self) -> str:
        """The forgotten classes, with their names where known: "class 1 (goldfish)"."""
        named = (f"{c} ({self.labels[c]})" if c in self.labels else str(c) for c in self.forgotten)
        return in_words(named, self.encoder)

    def raise_for_status(self) -> None:
        """Raises unless the verdict is ``passed``.

        Raises:
            VerdictError: it is not; the message is `str` of the verdict.
        """
        if not self.passed:
            raise VerdictError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with ``passed`` and ``sentence``."""
        labels = {str(index): name for index, name in self.labels.items()}
        computed = {"passed": self.passed, "sentence": self.sentence}
        return computed | asdict(self) | {"labels": labels}

    def __str__(self) -> str:
        asked = f" ({self.asked} was asked for)" if self.asked not in (None, self.level) else ""
        rows = [("result", self.leak, self.agreement)]
        if self.unmask_agreement is not None and not self.encoder:
            rows.append(("original last layer back", self.unmask_leak, self.unmask_agreement))
        outcome = "PASSED" if self.passed else "UNKNOWN" if self.leak is None else "FAILED"
        return "\n".join(
            [
                f"{outcome}: {self.sentence} Level: {self.level}{asked}.",
                *[
                    f"  {name + ':':26}{'?' if leak is None else f'{leak:.2%}':>7} of rows "
                    f"still recognised, {same:7.2%} of other answers kept"
                    for name, leak, same in rows
                ],
                *[f"  below par: {text}" for text in self.failures],
                *[f"  not covered: {text}" for text in self.not_covered],
            ]
        )


def _leak(validation: Mapping[str, Any]) -> float | None:
    """Of the rows of forgotten classes; a record of an earlier version has that of all rows."""
    leak: float | None = validation.get("forgotten_leak", validation["leak"])
    return leak


def in_words(classes: Iterable[int | str], identities: bool = False) -> str:
    """Returns "class 1", or "classes 1, 2"; of ``identities``, "identity 1"."""
    names = [str(c) for c in classes]
    one, several = ("identity", "identities") if identities else ("class", "classes")
    return f"{one if len(names) == 1 else several} {shorten(names)}"


def shortfalls(
    level: Level,
    leak: float | None,
    agreement: float,
    least_agreement: float,
    unmask_leak: float | None,
    most_leak: float = MOST_LEAK,
) -> list[str]:
    """Returns a sentence, without the full stop, for each figure that is below par."""
    texts = []
    if leak is not None and leak > most_leak:
        texts.append(
            f"{100 * leak:.1f} % of held-out rows of forgotten classes are still classified as one "
            f"(at most {100 * most_leak:.0f} % is expected)"
        )
    if agreement < least_agreement:
        texts.append(
            f"only {100 * agreement:.1f} % of held-out rows of other classes keep their answer "
            f"(at least {100 * least_agreement:.0f} % is expected), so the retained classes may "
            f"have suffered"
        )
    if level == "deep" and unmask_leak is not None and unmask_leak > MOST_UNMASK_LEAK:
        texts.append(
            f"with the original last layer put back, {100 * unmask_leak:.1f} % of held-out rows "
            f"of forgotten classes are recognised again (at most {100 * MOST_UNMASK_LEAK:.0f} % is "
            f"expected), so the features hold a part of them"
        )
    return texts
