"""The evidence behind checks and findings: an audit's numbers, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from .result import GOLDEN, MASK, ORIGINAL, UNLEARNED, Row
from .weights import LastLayer

# Limits, in per cent. An FA of 5 % is half of guessing among ten classes.
FORGOTTEN, UNMASK, COLLAPSED = 5.0, 10.0, 90.0
# Features whose drift is below this are the original's.
UNCHANGED = 1e-3
# Above this CKA, features differ only by rotation and scale (by the order of units, say).
ROTATED = 0.9995


@dataclass(frozen=True)
class UnmaskResult:
    """The highest FA that parts of the original's last layer bring back.

    Attributes:
        fa: in per cent.
        part: the restored part, in words.
        measured_on: "images" or "impressions".
    """

    fa: float
    part: str
    measured_on: str

    def __str__(self) -> str:
        restored = f"with the original's {self.part} put back"
        return f"{restored}, FA is {pct(self.fa)} on {self.measured_on}"


@dataclass(frozen=True)
class Evidence:
    """An audit's numbers, for its checks and findings.

    Attributes:
        rows: the rows of the audit.
        last_layer: the unlearned model's last layer compared with the original's.
        top_class: the unlearned model's most frequent prediction on retained classes.
        retained: the number of retained classes.
    """

    rows: list[Row]
    last_layer: LastLayer
    top_class: int
    retained: int

    def value(self, key: str, name: str = UNLEARNED) -> float | None:
        """Returns a model's metric, or None."""
        return next((row.get(key) for row in self.rows if row.name == name), None)

    def reason(self, key: str, name: str = UNLEARNED) -> str:
        """Returns why a model's metric is missing."""
        for row in self.rows:
            if row.name == name:
                return row.missing.get(key, "it was not measured")
        return f"no {name} model was given"

    def fa(self, name: str = UNLEARNED) -> tuple[float | None, str]:
        """Returns FA on images, or else on impressions, and which of them."""
        value = self.value("fa", name)
        if value is not None:
            return value, "images"
        return self.value("impressions_fa", name), "impressions"

    def unmasked(self, name: str = UNLEARNED) -> UnmaskResult | None:
        """Returns the highest FA that the original's last layer brings back.

        Compares the rows of the forgotten classes alone with the whole layer, on images or else on
        impressions. The whole layer counts only if the model works with it (RA at least half of the
        original's): on unrelated features a last layer predicts anything.
        """
        for infix, measured_on in (("", "images"), ("impressions_", "impressions")):
            found = []
            rows = self.value(f"unmask_{infix}fa", name)
            if rows is not None:
                found.append(UnmaskResult(rows, "last-layer rows", measured_on))
            whole = self.value(f"unmask_last_layer_{infix}fa", name)
            ra = self.value(f"unmask_last_layer_{infix}ra", name)
            original_ra = 100.0 if infix else self.value("ra", ORIGINAL)
            if whole is not None and ra is not None and original_ra and ra >= original_ra / 2:
                found.append(UnmaskResult(whole, "whole last layer", measured_on))
            if found:
                return max(found, key=lambda result: result.fa)
        return None

    @property
    def unmask_limit(self) -> float:
        """The highest un-mask FA that passes: 10 %, or more if the golden model's is higher."""
        golden = self.unmasked(GOLDEN)
        return UNMASK if golden is None else min(100.0, max(UNMASK, golden.fa + 5))

    @property
    def features_unchanged(self) -> bool:
        """Whether the features of the forgotten classes are the original's."""
        drift = self.value("drift_features_forget")
        return self.value("drift_backbone") == 0 or (drift is not None and drift < UNCHANGED)

    @property
    def features_rotated(self) -> bool:
        """Whether the features of the forgotten classes differ only by rotation and scale."""
        cka = self.value("cka_impressions")
        return cka is not None and cka > ROTATED

    @property
    def still_recognised(self) -> bool:
        """Whether FA is at least 90 % of the original's."""
        after, kind = self.fa()
        before = self.value("fa" if kind == "images" else "impressions_fa", ORIGINAL)
        return after is not None and before is not None and after >= 0.9 * before

    @property
    def collapsed(self) -> bool:
        """Whether the model predicts one class for nearly all retained images, unlike the mask."""
        share, masked = self.value("top_answer") or 0.0, self.value("top_answer", MASK) or 0.0
        return self.retained >= 2 and share >= COLLAPSED > masked


def pct(value: float | None) -> str:
    """Formats a percentage with one decimal."""
    return "unknown" if value is None else f"{value:.1f} %"
