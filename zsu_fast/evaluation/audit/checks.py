"""The checks of an unlearned model, each passed, failed, or unable to tell.

The golden model passes all of them: a check that fails a model which never saw the classes would
test something else. To add one, write a function from `Evidence` to `Check` and append it to
`CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .evidence import COLLAPSED, FORGOTTEN, UNCHANGED, Evidence, pct
from .outputs import MEMBERSHIP_SCORES
from .relearning import MIN_INDEX
from .result import GOLDEN, MASK, ORIGINAL, Check, CheckName, Trained

# RA may be this many points below the mask's.
RETAIN_LOSS = 5.0
# The share of the way from the original's to the golden model's level that features have to move.
MIN_WAY = 0.25
# The largest distance of a membership attack's AUC from the golden model's.
MEMBERSHIP = 0.05


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
    outputs, retained_classes, unmask, features_changed, last_layer, resynthesis,
    partial(separability, name=CheckName.PROBE, key="probe_forget"),
    partial(separability, name=CheckName.KNN, key="knn_forget"), membership_inference,
    partial(relearning, name=CheckName.RELEARN_LAST_LAYER, trained="last_layer"),
    partial(relearning, name=CheckName.RELEARN_FULL, trained="full"), divergence,
)  # fmt: skip


def checks(e: Evidence) -> list[Check]:
    """Runs all checks."""
    return [check(e) for check in CHECKS]
