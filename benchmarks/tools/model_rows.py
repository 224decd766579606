"""The rows of the table of models, and how they are written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FORGET = [2, 7, 11]
MEAN, STD = 0.5, 0.25
# What a level has to reach on images, in per cent: other answers kept, at least; forgotten classes
# recognised with the original last layer back, at most. Deep forgetting costs answers; the package
# itself calls less than 70 % of them, or more than 10 % recognised, below par.
KEPT = {"output": 98.0, "deep": 65.0}
MOST_BACK = 15.0
IMAGES = 320
FEW = {"scenes": 512, "large_scenes": 512, "inverted": 256, "steps": 60, "ascent_steps": 10}


@dataclass
class Result:
    """One unlearning: the level that was reached, and what was measured on images, in per cent.

    Attributes:
        level: "deep", "output", or "" if there was no result.
        outcome: "ok"; "warned" if the package said what is below par; "refused" if it raised an
            error of its own; "silent" if a check fails that it said nothing of; "crash".
        reason: why it is not "ok", or why the level is not the one asked for.
        leak: of all images, those assigned to a forgotten class.
        kept: of the images of other classes, those whose answer stayed.
        back: of the images of forgotten classes, those recognised with the original last layer put
            back; None at the output level.
        seconds: of the run.
        notes: other warnings.
    """

    level: str = ""
    outcome: str = "ok"
    reason: str = ""
    leak: float | None = None
    kept: float | None = None
    back: float | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass
class Row:
    """A row of the table; ``checks`` maps a check to "ok", or to why it failed."""

    model: str
    family: str
    side: int
    parameters: int = 0
    output: Result = field(default_factory=Result)
    deep: Result = field(default_factory=Result)
    checks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """What must not happen, in sentences: a crash, or a wrong result in silence."""
        found = [self.error] if self.error else []
        for name, result in (("output", self.output), ("deep", self.deep)):
            if result.outcome in ("silent", "crash"):
                found.append(f"{name}: {result.reason}")
        found += [f"{n}: {self.checks[n]}" for n in ("original", "reload")
                  if self.checks.get(n, "ok") != "ok"]  # fmt: skip
        return found

    @classmethod
    def of_dict(cls, values: dict[str, Any]) -> Row:
        """The row whose `dataclasses.asdict` is ``values``."""
        levels = {name: Result(**values[name]) for name in ("output", "deep")}
        return cls(**(values | levels))
