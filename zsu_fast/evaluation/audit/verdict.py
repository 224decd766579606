"""From numbers to words: the checks, the findings, and the sentences of the verdict.

The checks apply to any model put in as "unlearned". The golden model passes all of them: a test
that fails a model which never saw the classes tests something else.
"""

from __future__ import annotations

from collections.abc import Iterator

from .last_layer import LastLayer
from .relearning import AIN
from .result import Check, Finding, Row

# Limits, in per cent or as named. FA of 5 % is half of what guessing gives among ten classes.
FORGOTTEN, UNMASK, COLLAPSED, RETAIN_LOSS = 5.0, 10.0, 90.0, 5.0
# The share of the way from the original's to the golden model's level that a probe has to move.
WAY = 0.25
# The share from which on features are called forgotten, not forgotten in part.
MOST_OF_THE_WAY = 0.75
# How far from the golden model's AUC a membership attack may be.
MEMBERSHIP = 0.05
# Features that moved less than this are the original's.
UNMOVED = 1e-3
# CKA above which features differ by rotation and scale alone (units in another order, say).
ROTATED = 0.9995
# RA so many points below the mask's is called damage.
DAMAGED = 15.0


class Evidence:
    """The rows by name, and what was seen of the last layer."""

    def __init__(self, rows: list[Row], last: LastLayer, top: int, classes: int, forget: list[int]):
        self.rows = {row.name: row for row in rows}
        self.last, self.top = last, top
        self.kept = classes - len(forget)
        self.forget = forget

    def get(self, key: str, row: str = "unlearned") -> float | None:
        return self.rows[row].get(key) if row in self.rows else None

    def why(self, key: str, row: str = "unlearned") -> str:
        if row not in self.rows:
            return f"there is no {row} model"
        return self.rows[row].missing.get(key, "it was not measured")

    def both(self, data: str, free: str, row: str = "unlearned") -> tuple[float | None, str]:
        """The value on images if there is one, else that on impressions; and which it is."""
        value = self.get(data, row)
        if value is not None:
            return value, "images"
        return self.get(free, row), "impressions"

    @property
    def forgets(self) -> float | None:
        """FA on images, or on impressions."""
        return self.both("fa", "impressions_fa")[0]

    def unmasked(self, row: str = "unlearned") -> tuple[float | None, str]:
        """The highest FA that the original's last layer brings back, and how.

        Its rows of the forgotten classes alone, or all of it, on images and impressions. All of
        it counts only where the model still works with it (RA at least half of the original's):
        a last layer on features it was never made for answers anything.
        """
        found: list[tuple[float, str]] = []
        for kind in ("", "impressions_"):
            where = "impressions" if kind else "images"
            rows = self.get(f"unmask_{kind}fa", row)
            whole, works = (self.get(f"whole_head_{kind}{k}", row) for k in ("fa", "ra"))
            base = self.get("ra", "original") if not kind else 100.0
            if rows is not None:
                found.append((rows, f"the original's last-layer rows back, on {where}"))
            if whole is not None and works is not None and base and works >= base / 2:
                found.append((whole, f"the original's whole last layer back, on {where}"))
        images = [f for f in found if f[1].endswith("images")]
        return max(images or found, default=(None, ""), key=lambda f: f[0] or 0.0)

    @property
    def same_features(self) -> bool:
        """Whether the features of the forgotten classes are the original's."""
        moved = self.get("drift_features_forget")
        return self.get("drift_backbone") == 0 or (moved is not None and moved < UNMOVED)

    @property
    def only_turned(self) -> bool:
        """Whether the features of the forgotten classes are the original's but for a rotation."""
        alike = self.get("cka_impressions")
        return alike is not None and alike > ROTATED

    @property
    def answers_as_before(self) -> bool:
        now, kind = self.both("fa", "impressions_fa")
        before = self.get("fa" if kind == "images" else "impressions_fa", "original")
        return now is not None and before is not None and now >= 0.9 * before

    @property
    def collapsed(self) -> bool:
        share = self.get("top_answer")
        before = self.get("top_answer", "mask")
        if self.kept < 2 or share is None or (before is not None and before >= COLLAPSED):
            return False
        return share >= COLLAPSED


def findings(e: Evidence) -> list[Finding]:
    """What was recognised, the gravest first."""
    return list(_findings(e))


def _findings(e: Evidence) -> Iterator[Finding]:
    back = _back(e)
    if e.same_features and e.last.kind == "same":
        if e.answers_as_before:
            yield Finding(
                "untouched", "Nothing was forgotten: the weights are the original's, untouched"
            )
        else:
            yield Finding(
                "mask",
                f"Only the output was hidden, as by a mask: all weights are the original's, and "
                f"what hides the classes lies behind the last layer (FA {pct(e.forgets)})",
            )
        return
    if e.collapsed:
        yield Finding(
            "one class only",
            f"Nothing was forgotten in particular, the model is broken: it answers one class "
            f"only, class {e.top} for {pct(e.get('top_answer'))} of the images of classes to keep",
        )
    if e.same_features and e.last.kind == "shuffled":
        yield Finding(
            "shuffled head",
            f"Only the output was hidden, and spoilt, by a shuffled head: {e.last.says}; the "
            f"features before it are the original's{back}",
        )
    elif e.same_features and e.last.kind == "noise":
        yield Finding(
            "noise in the head",
            f"Only the output was hidden, and spoilt, by noise in the head: {e.last.says}; the "
            f"features before it are the original's{back}",
        )
    elif e.same_features and e.last.kind == "masked":
        yield Finding(
            "mask",
            f"Only the output was hidden, as by a mask: {e.last.says}; the features before the "
            f"last layer are the original's{back}",
        )
    elif e.same_features:
        yield Finding(
            "output level",
            f"Output-level forgetting: {e.last.says}; the features before it are the "
            f"original's{back}",
        )
    elif e.only_turned:
        yield Finding(
            "features kept",
            f"The features are the original's up to rotation and scale (CKA "
            f"{e.get('cka_impressions'):.4f} on impressions of the forgotten classes){back}",
        )
    elif _hidden_behind_head(e):
        yield Finding("hidden behind the head", "Only the output was hidden: with the original's "
                      f"last layer back the model works as before{back}")  # fmt: skip
    elif (e.unmasked()[0] or 0) > _unmask_limit(e):
        yield Finding("features kept", f"The features still serve the forgotten classes{back}")
    ra, base = e.get("ra"), e.get("ra", "mask")
    if ra is not None and base is not None and ra < base - DAMAGED and not e.collapsed:
        yield Finding("damaged", f"The model is damaged: RA is {pct(ra)}, the mask's {pct(base)}")
    if e.answers_as_before and not e.collapsed:
        now, kind = e.both("fa", "impressions_fa")
        yield Finding("not forgotten", f"The forgotten classes are answered as before: FA "
                      f"{pct(now)} on {kind}")  # fmt: skip


def _back(e: Evidence) -> str:
    """What the un-mask test says, as the end of a sentence."""
    value, how = e.unmasked()
    if value is None:
        return f" (no un-mask test: {e.why('unmask_impressions_fa')})"
    return f"; with {how}, FA is {pct(value)}"


def _hidden_behind_head(e: Evidence) -> bool:
    """Whether putting the whole last layer back gives the original's answers again."""
    for key, base in (
        ("whole_head_fa", "fa"),
        ("whole_head_impressions_fa", "impressions_fa"),
    ):
        now, before = e.get(key), e.get(base, "original")
        if now is not None and before:
            return now >= 0.8 * before
    return False


def checks(e: Evidence) -> list[Check]:
    """Each test, passed or not or not to be told."""
    return [
        _check_outputs(e),
        _check_works(e),
        _check_unmask(e),
        _check_features(e),
        _check_last_layer(e),
        _check_resynthesis(e),
        _check_level(e, "linear probe", "probe_forget"),
        _check_level(e, "k-NN", "knn_forget"),
        _check_membership(e),
        _check_relearn(e, "relearning, last layer", "relearn_head_steps", "ain_head"),
        _check_relearn(e, "relearning, all weights", "relearn_full_steps", "ain_full"),
        _check_distance(e),
    ]


def _check_outputs(e: Evidence) -> Check:
    value, kind = e.both("fa", "impressions_fa")
    if value is None:
        return Check("outputs", None, e.why("impressions_fa"))
    return Check("outputs", value <= FORGOTTEN, f"FA {pct(value)} on {kind}, at most {FORGOTTEN} %")


def _check_works(e: Evidence) -> Check:
    name, share = "the rest works", e.get("top_answer")
    if e.collapsed:
        return Check(name, False, f"{pct(share)} of the answers are class {e.top}")
    ra, base = e.get("ra"), e.get("ra", "mask")
    if ra is None or base is None:
        says = f"no single class has {COLLAPSED:.0f} % of the answers ({pct(share)}); RA: "
        return Check(name, True, says + e.why("ra"))
    says = f"RA {pct(ra)}, the mask's {pct(base)}, at most {RETAIN_LOSS:.0f} points lower"
    return Check(name, ra >= base - RETAIN_LOSS, says)


def _unmask_limit(e: Evidence) -> float:
    golden, _ = e.unmasked("golden")
    return UNMASK if golden is None else max(UNMASK, golden + 5)


def _check_unmask(e: Evidence) -> Check:
    value, how = e.unmasked()
    if value is None:
        return Check("un-mask", None, e.why("unmask_impressions_fa"))
    limit = _unmask_limit(e)
    return Check("un-mask", value <= limit, f"with {how}, FA is {pct(value)}, at most {pct(limit)}")


def _check_features(e: Evidence) -> Check:
    moved = e.get("drift_features_forget")
    if e.same_features:
        return Check("features changed", False, "the last layer's input is the original's")
    if e.only_turned:
        cka = e.get("cka_impressions")
        says = f"they are the original's up to rotation and scale (CKA {cka:.4f})"
        return Check("features changed", False, says)
    if moved is None:
        backbone = e.get("drift_backbone")
        if backbone is None:
            return Check("features changed", None, e.why("drift_features_forget"))
        return Check("features changed", True, f"weights before the last layer moved: {backbone}")
    return Check("features changed", True, f"drift {moved:.3g} on impressions, above {UNMOVED}")


def _check_last_layer(e: Evidence) -> Check:
    name = "no trick in the last layer"
    if e.last.kind == "unknown":
        return Check(name, None, e.last.says)
    if not e.same_features:
        return Check(name, True, "features changed too, so it is not the last layer alone")
    return Check(name, e.last.kind == "trained", e.last.says)


def _check_resynthesis(e: Evidence) -> Check:
    hit, before = e.get("resynthesis_hit"), e.get("resynthesis_hit", "original")
    if hit is None or before is None:
        return Check("re-synthesis", None, e.why("resynthesis_hit"))
    golden = e.get("resynthesis_hit", "golden")
    limit = max(before / 2, 0 if golden is None else golden + 10)
    says = f"ascent reaches the classes in {pct(hit)} of attempts, at most {pct(limit)}"
    return Check("re-synthesis", hit <= limit, says)


def _check_level(e: Evidence, name: str, key: str) -> Check:
    now, before, aim = e.get(key), e.get(key, "original"), e.get(key, "golden")
    if now is None or before is None:
        return Check(name, None, e.why(key))
    if e.same_features:
        return Check(name, False, f"{pct(now)}: the features are the original's ({pct(before)})")
    if aim is None:
        says = f"{pct(now)}, original {pct(before)}; {e.why(key, 'golden')} to say what is right"
        return Check(name, None, says)
    if before - aim < 2:
        says = (
            f"{pct(now)}; the golden model has {pct(aim)} and the original {pct(before)}: "
            f"too close to tell apart"
        )
        return Check(name, True if now <= max(before, aim) + 2 else None, says)
    way = (before - now) / (before - aim)
    says = (
        f"{pct(now)} is {100 * way:.0f} % of the way from the original's {pct(before)} to the "
        f"golden model's {pct(aim)}, at least {100 * WAY:.0f} %"
    )
    return Check(name, way >= WAY, says)


def _check_membership(e: Evidence) -> Check:
    name, told, good = "membership inference", [], True
    for score in ("confidence", "entropy", "loss"):
        key = f"mia_forget_{score}"
        now, aim = e.get(key), e.get(key, "golden")
        if now is None:
            return Check(name, None, e.why(key))
        if aim is None:
            return Check(
                name, None, f"AUC {now:.3f} by {score}; {e.why(key, 'golden')} to compare with"
            )
        good = good and abs(now - aim) <= MEMBERSHIP
        told.append(f"{score} {now:.3f} (golden {aim:.3f})")
    return Check(name, good, f"AUC by {', '.join(told)}, at most {MEMBERSHIP} apart")


def _check_relearn(e: Evidence, name: str, steps: str, index: str) -> Check:
    now, ratio = e.get(steps), e.get(index)
    if now is None:
        return Check(name, None, e.why(steps))
    golden, before = e.get(steps, "golden"), e.get(steps, "original")
    if golden is not None and before is not None and before >= golden:
        says = f"the original takes {before:.0f} steps, a model that never saw them {golden:.0f}"
        return Check(name, None, f"{says}: this tells nothing; raise relearn_steps, shots")
    if ratio is None and golden is not None and now >= golden:
        return Check(name, True, f"not within {now:.0f} steps, nor the golden model")
    if ratio is None:
        return Check(name, None, f"{now:.0f} steps; Anamnesis Index: {e.why(index)}")
    says = f"{now:.0f} steps, {ratio:.2f} of the golden model's, at least {AIN}"
    return Check(name, ratio >= AIN, says)


def _check_distance(e: Evidence) -> Check:
    name = "outputs like the golden model's"
    now, before = e.get("js_golden_forget"), e.get("js_golden_forget", "original")
    if now is None or before is None:
        return Check(name, None, e.why("js_golden_forget"))
    says = (
        f"JS divergence on forgotten classes is {now:.3f}, the original's {before:.3f}, at most "
        f"half of that"
    )
    return Check(name, now <= before / 2, says)


def sentences(e: Evidence, found: list[Finding], tests: list[Check]) -> list[str]:
    """The verdict, the most important sentence first."""
    told = [f.says[0].upper() + f.says[1:] + "." for f in found]
    if not found:
        told = [_headline(e)]
    fa, kind = e.both("fa", "impressions_fa")
    before, _ = e.both("fa", "impressions_fa", "original")
    line = f"Outputs: FA {pct(fa)} on {kind}, {pct(before)} in the original"
    if e.get("ra") is not None:
        line += (
            f"; RA {pct(e.get('ra'))}, {pct(e.get('ra', 'original'))} in the original and "
            f"{pct(e.get('ra', 'mask'))} in a mask"
        )
    told.append(line + ".")
    if found and e.get("probe_forget") is not None:
        told.append(f"Features: {_probe(e)}.")
    failed = [t.name for t in tests if t.passed is False]
    unknown = [t.name for t in tests if t.passed is None]
    passed = sum(t.passed is True for t in tests)
    line = f"{passed} of {len(tests)} tests passed"
    line += f"; failed: {', '.join(failed)}" if failed else "; none failed"
    told.append(line + (f"; can't be told: {', '.join(unknown)}." if unknown else "."))
    return told


def _headline(e: Evidence) -> str:
    value = e.forgets
    if value is None or value > FORGOTTEN:
        return f"Partly forgotten: FA is still {pct(value)}."
    if e.get("probe_forget") is None:
        return (
            f"Outputs forgotten, and with {e.unmasked()[1]}, FA is {pct(e.unmasked()[0])}; "
            f"whether features are still separable can't be told: {e.why('probe_forget')}."
        )
    now, before, aim = (e.get("probe_forget", n) for n in ("unlearned", "original", "golden"))
    if _check_level(e, "", "probe_forget").passed and None not in (now, before, aim):
        assert now is not None
        assert before is not None
        assert aim is not None
        if now - aim > (1 - MOST_OF_THE_WAY) * max(before - aim, 2):
            return f"Outputs forgotten, features in part: {_probe(e)}."
        return f"Forgotten in outputs and features: {_probe(e)}."
    return f"Outputs forgotten; features still separable: {_probe(e)}."


def _probe(e: Evidence) -> str:
    text = f"a linear probe recovers {pct(e.get('probe_forget'))} of the forgotten classes, "
    text += f"{pct(e.get('probe_forget', 'original'))} in the original"
    golden = e.get("probe_forget", "golden")
    if golden is not None:
        return text + f" and {pct(golden)} in a model that never saw them"
    return text + f" ({e.why('probe_forget', 'golden')}, so what is right can't be told)"


def pct(value: float | None) -> str:
    """A percentage with one decimal."""
    return "unknown" if value is None else f"{value:.1f} %"
