"""The checks, findings and verdict of an encoder's audit, from its rows of metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .checks import Evidence, pct, relearning, separability
from .result import ORIGINAL, Check, CheckName, EncoderCheckName, Finding, FindingName
from .verdict import count_of_tests

# In per cent: of images of forgotten identities that may be identified, of rank-1 of retained ones
# that may be lost.
IDENTIFIED, RETAIN_LOSS = 3.0, 2.0
# The most that one retained identity may attract, in equal shares; and the most images that may be
# taken for another identity: in strangers' rates, in points above the original's rate without
# their own templates, and in per cent.
ATTRACTION, STRANGERS, MORE_ACCUSED, FEW_ACCUSED = 2.0, 2.0, 2.0, 5.0


def identification(e: Evidence) -> Check:
    """The forgotten identities are not identified, at the new or at the original threshold."""
    name = EncoderCheckName.IDENTIFICATION
    found = {
        "identified_forget_1e2": "at the threshold of a false-accept rate of 1 %",
        "identified_forget_original": "at the original's",
    }
    known = {words: e.value(key) for key, words in found.items() if e.value(key) is not None}
    if not known:
        rank1, where = e.value("rank1_forget"), "images"
        if rank1 is None:
            rank1, where = e.value("impressions_fa"), "impressions"
        if rank1 is None:
            return Check(name, None, e.reason("impressions_fa"))
        says = f"rank-1 {pct(rank1)} on {where}, no threshold: {e.reason('identified_forget_1e2')}"
        # without a threshold, strangers are assigned to somebody too
        return Check(name, True if rank1 <= IDENTIFIED else None, says)
    says = ", ".join(f"{pct(value)} {words}" for words, value in known.items())
    passed = all(value is not None and value <= IDENTIFIED for value in known.values())
    return Check(name, passed, f"identified: {says} (at most {pct(IDENTIFIED)})")


def retained(e: Evidence) -> Check:
    """The other identities are identified as by the original."""
    for key, words in (
        ("identified_retain_1e2", "identified at a false-accept rate of 1 %"),
        ("rank1_retain", "rank-1"),
    ):
        after, before = e.value(key), e.value(key, ORIGINAL)
        if after is not None and before is not None:
            says = f"{words}: {pct(after)}, the original's {pct(before)}"
            return Check(
                EncoderCheckName.RETAINED_IDENTITIES, after >= before - RETAIN_LOSS,
                f"{says} (at most {RETAIN_LOSS:.0f} points lower)",
            )  # fmt: skip
    return Check(EncoderCheckName.RETAINED_IDENTITIES, None, e.reason("rank1_retain"))


def strangers(e: Evidence) -> Check:
    """Nobody is accused: forgotten identities are accepted as somebody else as strangers are."""
    name = EncoderCheckName.STRANGERS
    accused, ratio = e.value("accused_1e2"), e.value("attraction_1e2")
    stranger, before = e.value("strangers_1e2", ORIGINAL), e.value("accused_1e2", ORIGINAL)
    if accused is None or ratio is None or stranger is None or before is None:
        return Check(name, None, e.reason("accused_1e2"))
    limit = max(STRANGERS * stranger, before + MORE_ACCUSED, FEW_ACCUSED)
    says = (
        f"{pct(accused)} of the images of forgotten identities are taken for a retained one (at "
        f"most {pct(limit)}; in the original, {pct(before)} without their own templates, and "
        f"{pct(stranger)} of other strangers), and one attracts {ratio:.2f} equal shares of them "
        f"(at most {ATTRACTION:.0f})"
    )
    return Check(name, accused <= limit and ratio <= ATTRACTION, says)


CHECKS: tuple[Callable[[Evidence], Check], ...] = (
    identification, retained, strangers,
    partial(separability, name=EncoderCheckName.REENROLMENT, key="reenrolled_rank1_forget"),
    partial(separability, name=CheckName.PROBE, key="probe_forget"),
    partial(relearning, name=CheckName.RELEARN_FULL, trained="full"),
)  # fmt: skip


def encoder_findings(e: Evidence, untouched: bool) -> list[Finding]:
    """What is wrong with the unlearned encoder, the gravest first.

    Args:
        e: the numbers.
        untouched: whether its weights are the original's.
    """
    found = []
    if untouched:
        found.append(Finding(
            FindingName.UNTOUCHED,
            "The encoder is the original's, bit for bit: whoever has a template recognises the "
            "identity, whatever is removed from the gallery",
        ))  # fmt: skip
    elif identification(e).passed is False:
        found.append(Finding(
            FindingName.NOT_FORGOTTEN,
            f"The forgotten identities are still recognised by their templates: "
            f"{identification(e).says}",
        ))  # fmt: skip
    if retained(e).passed is False:
        found.append(Finding(FindingName.DAMAGED, f"The encoder is damaged: {retained(e).says}"))
    if strangers(e).passed is False and not untouched:
        found.append(Finding(
            FindingName.ACCUSES, f"The forgotten identities are taken for others: "
            f"{strangers(e).says}",
        ))  # fmt: skip
    return found


def encoder_verdict(e: Evidence, found: list[Finding], tests: list[Check]) -> list[str]:
    """The sentences of the verdict, the most important first."""
    first = identification(e)
    says = [f"{finding.says}." for finding in found]
    if not found:
        head = "Not recognised by the original's templates" if first.passed else "Can't tell"
        says.append(f"{head}: {first.says}.")
    if (rank1 := e.value("reenrolled_rank1_forget")) is not None:
        golden = e.value("reenrolled_rank1_forget", "golden")
        known = (
            f"golden encoder {pct(golden)}" if golden is not None
            else f"the right level is unknown: {e.reason('reenrolled_rank1_forget', 'golden')}"
        )  # fmt: skip
        says.append(
            f"Enrolled again with the new encoder, the forgotten identities are recognised in "
            f"{pct(rank1)} of their images (original "
            f"{pct(e.value('reenrolled_rank1_forget', ORIGINAL))}, {known})."
        )
    return [*says, count_of_tests(tests)]
