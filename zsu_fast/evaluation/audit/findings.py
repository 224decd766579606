"""What an audit recognises: masks, shuffles, noise, a collapse, unchanged features.

No finding applies to the golden model: it never saw the classes, so it has nothing to hide.
"""

from __future__ import annotations

from .evidence import Evidence, pct
from .names import MASK, ORIGINAL, FindingName
from .result import Finding

# An RA this many points below the mask's is called damage.
DAMAGE = 15.0
# Findings about the last layer, by its change, if the features are the original's.
_LAST_LAYER = {
    "shuffled": (
        FindingName.SHUFFLED,
        "Only the output was hidden, and degraded, by a shuffled last layer",
    ),
    "noise": (
        FindingName.NOISE,
        "Only the output was hidden, and degraded, by noise in the last layer",
    ),
    "masked": (FindingName.MASK, "Only the output was hidden, as by a mask"),
}
_OUTPUT_LEVEL = (FindingName.OUTPUT_LEVEL, "Output-level forgetting")


def findings(e: Evidence) -> list[Finding]:
    """Returns what the audit recognised, the gravest first."""
    unchanged = _unchanged(e)
    if unchanged is not None:
        return [unchanged]
    found = (_collapsed(e), _features(e), _damaged(e), _not_forgotten(e))
    return [finding for finding in found if finding is not None]


def _unchanged(e: Evidence) -> Finding | None:
    if not e.features_unchanged or e.last_layer.change != "same":
        return None
    if e.still_recognised:
        return Finding(
            FindingName.UNTOUCHED,
            "Nothing was forgotten: the model has the original's features, last layer and outputs",
        )
    return Finding(
        FindingName.MASK,
        f"Only the output was hidden, as by a mask: the features and the last layer are the "
        f"original's, and the classes are hidden after the last layer (FA {pct(e.fa()[0])})",
    )


def _collapsed(e: Evidence) -> Finding | None:
    if not e.collapsed:
        return None
    return Finding(
        FindingName.ONE_CLASS,
        f"Nothing in particular was forgotten: the model is broken and predicts one class only, "
        f"class {e.top_class} for {pct(e.value('top_answer'))} of the images of retained classes",
    )


def _features(e: Evidence) -> Finding | None:
    """The finding about the last layer if the features are unchanged, else about the features."""
    restored = _restored(e)
    if e.features_unchanged:
        name, words = _LAST_LAYER.get(e.last_layer.change, _OUTPUT_LEVEL)
        return Finding(
            name, f"{words}: {e.last_layer.says}; the features are the original's{restored}"
        )
    if e.features_rotated:
        return Finding(
            FindingName.FEATURES_KEPT,
            f"The features are the original's up to rotation and scale (CKA "
            f"{e.value('cka_impressions'):.4f} on impressions of the forgotten classes){restored}",
        )
    if _hidden_by_last_layer(e):
        return Finding(
            FindingName.HIDDEN,
            f"Only the output was hidden: putting the original's last layer back restores the "
            f"forgotten classes{restored}",
        )
    result = e.unmasked()
    if result is not None and result.fa > e.unmask_limit:
        return Finding(
            FindingName.FEATURES_KEPT, f"The features still hold the forgotten classes{restored}"
        )
    return None


def _damaged(e: Evidence) -> Finding | None:
    ra, masked = e.value("ra"), e.value("ra", MASK)
    if ra is None or masked is None or ra >= masked - DAMAGE or e.collapsed:
        return None
    return Finding(
        FindingName.DAMAGED, f"The model is damaged: RA is {pct(ra)}, the mask's is {pct(masked)}"
    )


def _not_forgotten(e: Evidence) -> Finding | None:
    if not e.still_recognised or e.collapsed:
        return None
    fa, kind = e.fa()
    return Finding(
        FindingName.NOT_FORGOTTEN,
        f"The forgotten classes are still recognised: FA is {pct(fa)} on {kind}",
    )


def _restored(e: Evidence) -> str:
    """The result of the un-mask test, as the end of a sentence."""
    result = e.unmasked()
    if result is None:
        return f" (no un-mask test: {e.reason('unmask_impressions_fa')})"
    return f"; {result}"


def _hidden_by_last_layer(e: Evidence) -> bool:
    """Whether FA with the whole last layer put back is at least 80 % of the original's FA."""
    for infix in ("", "impressions_"):
        restored = e.value(f"unmask_last_layer_{infix}fa")
        before = e.value(f"{infix}fa", ORIGINAL)
        if restored is not None and before:
            return restored >= 0.8 * before
    return False
