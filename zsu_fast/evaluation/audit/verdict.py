"""The verdict: the sentences that sum up findings, numbers and checks."""

from __future__ import annotations

from .checks import linear_probe
from .evidence import FORGOTTEN, Evidence, pct
from .names import GOLDEN, MASK, ORIGINAL
from .result import Check, Finding

# The share of the way to the golden model's level from which features count as forgotten.
MOST_OF_THE_WAY = 0.75


def sentences(e: Evidence, found: list[Finding], tests: list[Check]) -> list[str]:
    """Returns the sentences of the verdict, the most important first."""
    verdict = [f"{finding.says}." for finding in found] or [_headline(e)]
    verdict.append(_outputs(e))
    if found and e.value("probe_forget") is not None:
        verdict.append(f"Features: {_probe(e)}.")
    verdict.append(_count(tests))
    return verdict


def _headline(e: Evidence) -> str:
    """The first sentence if the audit recognised nothing suspicious."""
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
    if not linear_probe(e).passed or before is None or golden is None:
        return f"Outputs forgotten; features still separable: {_probe(e)}."
    if after - golden > (1 - MOST_OF_THE_WAY) * max(before - golden, 2):
        return f"Outputs forgotten, features in part: {_probe(e)}."
    return f"Forgotten in outputs and features: {_probe(e)}."


def _outputs(e: Evidence) -> str:
    """FA and RA."""
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


def _count(tests: list[Check]) -> str:
    """How many tests passed, and which did not."""
    passed = sum(t.passed is True for t in tests)
    failed = [t.name for t in tests if t.passed is False]
    unknown = [t.name for t in tests if t.passed is None]
    text = f"{passed} of {len(tests)} tests passed; "
    text += f"failed: {', '.join(failed)}" if failed else "none failed"
    return text + (f"; can't tell: {', '.join(unknown)}." if unknown else ".")
