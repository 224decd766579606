"""The verdict: what an audit recognises (masks, shuffles, noise, ...), and its sentences.

No finding applies to the golden model: it never saw the classes, so it has nothing to hide.
"""

from __future__ import annotations

from .checks import FORGOTTEN, Evidence, pct, separability
from .result import GOLDEN, MASK, ORIGINAL, Check, CheckName, Finding, FindingName

# An RA this many points below the mask's is called damage.
DAMAGE = 15.0
# The share of the way to the golden model's level from which features count as forgotten.
MOST_OF_THE_WAY = 0.75
# Findings about the last layer, by its change, if the features are the original's.
_LAST_LAYER = {
    "shuffled": (FindingName.SHUFFLED,
                 "Only the output was hidden, and degraded, by a shuffled last layer"),
    "noise": (FindingName.NOISE,
              "Only the output was hidden, and degraded, by noise in the last layer"),
    "masked": (FindingName.MASK, "Only the output was hidden, as by a mask"),
}  # fmt: skip
_OUTPUT_LEVEL = (FindingName.OUTPUT_LEVEL, "Output-level forgetting")


def findings(e: Evidence) -> list[Finding]:
    """Returns what the audit recognised, the gravest first."""
    if unchanged := _unchanged(e):
        return [unchanged]
    found = (_collapsed(e), _features(e), _damaged(e), _not_forgotten(e))
    return [finding for finding in found if finding]


def _unchanged(e: Evidence) -> Finding | None:
    if not e.features_unchanged or e.last_layer.change != "same":
        return None
    if e.still_recognised:
        says = "the model has the original's features, last layer and outputs"
        return Finding(FindingName.UNTOUCHED, f"Nothing was forgotten: {says}")
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
        says = f"{words}: {e.last_layer.says}; the features are the original's{restored}"
        return Finding(name, says)
    if e.features_rotated:
        return Finding(
            FindingName.FEATURES_KEPT,
            f"The features are the original's up to rotation and scale (CKA "
            f"{e.value('cka_impressions'):.4f} on impressions of the forgotten classes){restored}",
        )
    if _hidden_by_last_layer(e):
        says = "putting the original's last layer back restores the forgotten classes"
        return Finding(FindingName.HIDDEN, f"Only the output was hidden: {says}{restored}")
    result = e.unmasked()
    if result is not None and result.fa > e.unmask_limit:
        says = f"The features still hold the forgotten classes{restored}"
        return Finding(FindingName.FEATURES_KEPT, says)
    return None


def _damaged(e: Evidence) -> Finding | None:
    ra, masked = e.value("ra"), e.value("ra", MASK)
    if ra is None or masked is None or ra >= masked - DAMAGE or e.collapsed:
        return None
    says = f"The model is damaged: RA is {pct(ra)}, the mask's is {pct(masked)}"
    return Finding(FindingName.DAMAGED, says)


def _not_forgotten(e: Evidence) -> Finding | None:
    if not e.still_recognised or e.collapsed:
        return None
    fa, kind = e.fa()
    says = f"The forgotten classes are still recognised: FA is {pct(fa)} on {kind}"
    return Finding(FindingName.NOT_FORGOTTEN, says)


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


def sentences(e: Evidence, found: list[Finding], tests: list[Check]) -> list[str]:
    """Returns the sentences of the verdict, the most important first."""
    verdict = [f"{finding.says}." for finding in found] or [_headline(e)]
    verdict.append(_outputs(e))
    if found and e.value("probe_forget") is not None:
        verdict.append(f"Features: {_probe(e)}.")
    verdict.append(count_of_tests(tests))
    return verdict


def _headline(e: Evidence) -> str:
    """The first sentence if there is no finding."""
    fa, _ = e.fa()
    if fa is None or fa > FORGOTTEN:
        return f"Partly forgotten: FA is still {pct(fa)}."
    after = e.value("probe_forget")
    if after is None:
        restored = e.unmasked() or f"no un-mask test: {e.reason('unmask_impressions_fa')}"
        return (
            f"Outputs forgotten; {restored}. Whether a linear probe still separates the classes "
            f"is unknown: {e.reason('probe_forget')}."
        )
    before, golden = e.value("probe_forget", ORIGINAL), e.value("probe_forget", GOLDEN)
    moved = separability(e, CheckName.PROBE, "probe_forget").passed
    if not moved or before is None or golden is None:
        return f"Outputs forgotten; features still separable: {_probe(e)}."
    if after - golden > (1 - MOST_OF_THE_WAY) * max(before - golden, 2):
        return f"Outputs forgotten, features in part: {_probe(e)}."
    return f"Forgotten in outputs and features: {_probe(e)}."


def _outputs(e: Evidence) -> str:
    fa, kind = e.fa()
    text = f"Outputs: FA {pct(fa)} on {kind} (original {pct(e.fa(ORIGINAL)[0])})"
    if e.value("ra") is not None:
        ra, original, masked = (pct(e.value("ra", n)) for n in ("unlearned", ORIGINAL, MASK))
        text += f"; RA {ra} (original {original}, mask {masked})"
    return f"{text}."


def _probe(e: Evidence) -> str:
    """The linear probe's accuracy, without the full stop."""
    after, before = pct(e.value("probe_forget")), pct(e.value("probe_forget", ORIGINAL))
    text = f"a linear probe recovers {after} of the forgotten classes (original {before}"
    golden = e.value("probe_forget", GOLDEN)
    if golden is not None:
        return f"{text}, golden model {pct(golden)})"
    return f"{text}; the right level is unknown: {e.reason('probe_forget', GOLDEN)})"


def count_of_tests(tests: list[Check]) -> str:
    """How many tests passed, and which did not, in a sentence."""
    passed = sum(t.passed is True for t in tests)
    failed = [t.name for t in tests if t.passed is False]
    unknown = [t.name for t in tests if t.passed is None]
    text = f"{passed} of {len(tests)} tests passed; "
    text += f"failed: {', '.join(failed)}" if failed else "none failed"
    return text + (f"; can't tell: {', '.join(unknown)}." if unknown else ".")
