"""The evidence of an audit, and the checks of the unlearned model: passed, failed, or can't tell.

The golden model passes all checks: one that fails a model which never saw the classes would test
something else. To add one, write a function from `Evidence` to `Check` and append it to `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .outputs import MEMBERSHIP_SCORES
from .relearning import MIN_INDEX
from .result import GOLDEN, MASK, ORIGINAL, UNLEARNED, Check, CheckName, Row, Trained
from .weights import LastLayer

# Limits, in per cent. An FA of 5 % is half of guessing among ten classes.
FORGOTTEN, UNMASK, COLLAPSED = 5.0, 10.0, 90.0
# Features whose drift is below this are the original's.
UNCHANGED = 1e-3
# Above this CKA, features differ only by rotation and scale (by the order of units, say).
ROTATED = 0.9995
# RA may be this many points below the mask's.
RETAIN_LOSS = 5.0
# The share of the way from the original's to the golden model's level that features have to move.
MIN_WAY = 0.25
# The largest distance of a membership attack's AUC from the golden model's.
MEMBERSHIP = 0.05


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
        retained, forgotten: the number of retained and of forgotten classes.
    """

    rows: list[Row]
    last_layer: LastLayer
    top_class: int
    retained: int
    forgotten: int

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


def outputs(e: Evidence) -> Check:
    """FA is low."""
    fa, kind = e.fa()
    if fa is None:
        return Check(CheckName.OUTPUTS, None, e.reason("impressions_fa"))
    says = f"FA {pct(fa)} on {kind} (at most {pct(FORGOTTEN)})"
    return Check(CheckName.OUTPUTS, fa <= FORGOTTEN, says)


def retained_classes(e: Evidence) -> Check:
    """RA is close to the mask's, and the model predicts more than one class."""
    name, share = CheckName.RETAINED, pct(e.value("top_answer"))
    if e.collapsed:
        return Check(name, False, f"{share} of the predictions are class {e.top_class}")
    ra, masked = e.value("ra"), e.value("ra", MASK)
    if ra is None or masked is None:
        if e.value("top_answer") is None:  # of a multi-label model
            return Check(name, None, e.reason("ra"))
        says = f"the most frequent class gets {share} of the predictions (below {COLLAPSED:.0f} %)"
        return Check(name, True, f"{says}; no RA: {e.reason('ra')}")
    says = f"RA {pct(ra)}, the mask's {pct(masked)} (at most {RETAIN_LOSS:.0f} points lower)"
    return Check(name, ra >= masked - RETAIN_LOSS, says)


def unmask(e: Evidence) -> Check:
    """The original's last layer does not bring the classes back."""
    result = e.unmasked()
    if result is None:
        return Check(CheckName.UNMASK, None, e.reason("unmask_impressions_fa"))
    limit = e.unmask_limit
    return Check(CheckName.UNMASK, result.fa <= limit, f"{result} (at most {pct(limit)})")


def adapted_unmask(e: Evidence) -> Check:
    """The original's last layer, re-fitted to the features, restores at most half of its FA."""
    words = "with the original's last layer re-fitted to the features, FA is"
    return _at_most_half(e, CheckName.ADAPTED_UNMASK, "adapted_unmask_fa", words)


def among_forgotten(e: Evidence) -> Check:
    """The original's last layer tells the forgotten classes apart half as well, or less."""
    chance = 100 / max(1, e.forgotten)
    words = f"accuracy by the forgotten logits alone (chance {pct(chance)}) is"
    return _at_most_half(e, CheckName.AMONG_FORGOTTEN, "unmask_ff", words, chance)


def _at_most_half(e: Evidence, name: str, key: str, words: str, chance: float = 0.0) -> Check:
    """The accuracy above chance is at most half of the original's, or close to the golden model's.

    Without a golden model a higher accuracy fails only on the original's features: a model that
    never saw the classes may separate them too.
    """
    after, before, golden = e.value(key), e.value(key, ORIGINAL), e.value(key, GOLDEN)
    if after is None or before is None:
        return Check(name, None, e.reason(key))
    if before <= chance:
        says = f"{words} {pct(after)}; the original's {pct(before)} is no better than chance"
        return Check(name, None, says)
    limit = min(100.0, max((before + chance) / 2, 0 if golden is None else golden + 5))
    says = f"{words} {pct(after)} (at most {pct(limit)})"
    if after > limit and golden is None and not (e.features_unchanged or e.features_rotated):
        says = f"{says}; the right level is unknown: {e.reason(key, GOLDEN)}"
        return Check(name, None, says)
    return Check(name, after <= limit, says)


def features_changed(e: Evidence) -> Check:
    """The features of the forgotten classes differ from the original's."""
    name = CheckName.FEATURES
    if e.features_unchanged:
        return Check(name, False, "the last layer's input is the original's")
    if e.features_rotated:
        cka = e.value("cka_impressions")
        says = f"they are the original's up to rotation and scale (CKA {cka:.4f})"
        return Check(name, False, says)
    drift, weights = e.value("drift_features_forget"), e.value("drift_backbone")
    if drift is not None:
        return Check(name, True, f"drift {drift:.3g} on impressions (at least {UNCHANGED})")
    if weights is not None:
        return Check(name, True, f"the weights before the last layer changed by {weights:.3g}")
    return Check(name, None, e.reason("drift_features_forget"))


def last_layer(e: Evidence) -> Check:
    """The last layer was trained, or is not the only change."""
    name, change = CheckName.LAST_LAYER, e.last_layer.change
    if change == "unknown":
        return Check(name, None, e.last_layer.says)
    if not e.features_unchanged:
        return Check(name, True, "the features changed too, not the last layer alone")
    return Check(name, change == "trained", e.last_layer.says)


def resynthesis(e: Evidence) -> Check:
    """Gradient ascent reaches the forgotten classes half as often as in the original, or less."""
    hit, before = e.value("resynthesis_hit"), e.value("resynthesis_hit", ORIGINAL)
    if hit is None or before is None:
        return Check(CheckName.RESYNTHESIS, None, e.reason("resynthesis_hit"))
    golden = e.value("resynthesis_hit", GOLDEN)
    limit = min(100.0, max(before / 2, 0 if golden is None else golden + 10))
    says = f"{pct(hit)} of the ascents reach the forgotten classes (at most {pct(limit)})"
    return Check(CheckName.RESYNTHESIS, hit <= limit, says)


def separability(e: Evidence, name: str, key: str) -> Check:
    """The accuracy of a linear probe, or of k-NN, moved towards the golden model's."""
    after, before, golden = e.value(key), e.value(key, ORIGINAL), e.value(key, GOLDEN)
    if after is None or before is None:
        return Check(name, None, e.reason(key))
    if e.features_unchanged:
        return Check(name, False, f"{pct(after)}; the features are the original's ({pct(before)})")
    if golden is None:
        says = f"{pct(after)}, the original's {pct(before)}; the right level is unknown: "
        return Check(name, None, says + e.reason(key, GOLDEN))
    if before - golden < 2:
        says = (
            f"{pct(after)}; the golden model's {pct(golden)} and the original's {pct(before)} are "
            f"too close to tell apart"
        )
        return Check(name, True if after <= max(before, golden) + 2 else None, says)
    way = (before - after) / (before - golden)
    says = (
        f"{pct(after)} is {100 * way:.0f} % of the way from the original's {pct(before)} to the "
        f"golden model's {pct(golden)} (at least {100 * MIN_WAY:.0f} %)"
    )
    return Check(name, way >= MIN_WAY, says)


def membership_inference(e: Evidence) -> Check:
    """Membership attacks on forgotten classes do as well as on the golden model."""
    name, parts, passed = CheckName.MEMBERSHIP, [], True
    for score in MEMBERSHIP_SCORES:
        key = f"mia_forget_{score}"
        auc, golden = e.value(key), e.value(key, GOLDEN)
        if auc is None:
            return Check(name, None, e.reason(key))
        if golden is None:
            says = f"AUC by {score} {auc:.3f}; nothing to compare with: {e.reason(key, GOLDEN)}"
            return Check(name, None, says)
        passed = passed and abs(auc - golden) <= MEMBERSHIP
        parts.append(f"{score} {auc:.3f} (golden {golden:.3f})")
    return Check(name, passed, f"AUC by {', '.join(parts)}, at most {MEMBERSHIP} apart")


def relearning(e: Evidence, name: str, trained: Trained) -> Check:
    """Relearning takes at least half of the golden model's steps."""
    steps_key, index_key = f"relearn_{trained}_steps", f"ain_{trained}"
    steps, index = e.value(steps_key), e.value(index_key)
    if steps is None:
        return Check(name, None, e.reason(steps_key))
    golden, before = e.value(steps_key, GOLDEN), e.value(steps_key, ORIGINAL)
    if golden is not None and before is not None and before >= golden:
        says = f"the original takes {before:.0f} steps and the golden model {golden:.0f}"
        return Check(name, None, f"{says}, which tells nothing; raise relearn_steps and shots")
    if index is not None:
        says = f"{steps:.0f} steps, {index:.2f} of the golden model's (at least {MIN_INDEX})"
        return Check(name, index >= MIN_INDEX, says)
    if golden is not None and steps >= golden:
        says = f"neither it nor the golden model relearned in {steps:.0f} steps"
        return Check(name, True, says)
    return Check(name, None, f"{steps:.0f} steps, no Anamnesis Index: {e.reason(index_key)}")


def divergence(e: Evidence) -> Check:
    """Outputs on forgotten classes are closer to the golden model's than the original's are."""
    name, key = CheckName.DIVERGENCE, "js_golden_forget"
    after, before = e.value(key), e.value(key, ORIGINAL)
    if after is None or before is None:
        return Check(name, None, e.reason(key))
    says = f"JS divergence on forgotten classes is {after:.3f}, the original's {before:.3f}"
    return Check(name, after <= before / 2, f"{says} (at most half of that)")


CHECKS: tuple[Callable[[Evidence], Check], ...] = (
    outputs, retained_classes, unmask, adapted_unmask, among_forgotten, features_changed,
    last_layer, resynthesis,
    partial(separability, name=CheckName.PROBE, key="probe_forget"),
    partial(separability, name=CheckName.KNN, key="knn_forget"), membership_inference,
    partial(relearning, name=CheckName.RELEARN_LAST_LAYER, trained="last_layer"),
    partial(relearning, name=CheckName.RELEARN_FULL, trained="full"), divergence,
)  # fmt: skip


def checks(e: Evidence) -> list[Check]:
    """Runs all checks."""
    return [check(e) for check in CHECKS]
