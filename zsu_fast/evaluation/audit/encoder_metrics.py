"""The metrics of the audit of an encoder, defined as those in ``metrics.py``."""

from __future__ import annotations

from dataclasses import replace

from ..encoder_evaluation import far_name
from ..identification import FARS
from .metrics import BY_KEY, Metric

_PERCENT = "0 to 100 %"
_PARTS = (("forget", "forgotten identities"), ("retain", "other identities"))
_GALLERY = "with the original's templates of all identities"
_THRESHOLD = (
    "above the similarity that at most a share of {far:.0e} of impostor pairs exceeds: images of "
    "retained identities and templates of other retained ones"
)
_GOLDEN = "close to the golden encoder's value, which is not 0"
_SOURCE = "NIST FRVT 1:N"
_FRESH = "templates enrolled with the encoder under test, from images that are not measured on"


def _at(far: float) -> tuple[Metric, ...]:
    name, percent = far_name(far), f"{100 * far:g} %"
    threshold = _THRESHOLD.format(far=far)
    return (
        *(
            Metric(f"identified_{part}_{name}", f"identified at FAR {percent}, {words}",
                   "identification",
                   f"images of the {words} whose most similar identity is their own, and "
                   f"{threshold} / all of them; {_GALLERY}", _PERCENT,
                   "low; 3 % or less passes" if part == "forget" else "high: the original's",
                   _SOURCE, "data")
            for part, words in _PARTS
        ),
        *(
            Metric(f"tar_{part}_{name}", f"TAR at FAR {percent}, {words}", "verification",
                   f"images of the {words} whose similarity with their own identity is "
                   f"{threshold} / all of them; {_GALLERY}", _PERCENT,
                   "low" if part == "forget" else "high: the original's",
                   "IJB-C, 1:1 verification", "data")
            for part, words in _PARTS
        ),
        Metric(f"threshold_{name}", f"threshold at FAR {percent}", "identification",
               f"an image is accepted {threshold}",
               "that of similarities", "descriptive", _SOURCE, "data"),
        Metric(f"accused_{name}", f"taken for another at FAR {percent}", "strangers",
               f"images of the forgotten identities with a retained identity {threshold} / all "
               f"of them", _PERCENT, "as for strangers", "ours", "data"),
        Metric(f"strangers_{name}", f"strangers accepted at FAR {percent}", "strangers",
               "the same for images of retained identities whose own templates are left out",
               _PERCENT, "descriptive: what happens to people who are not enrolled", _SOURCE,
               "data"),
        Metric(f"attraction_{name}", f"attraction at FAR {percent}", "strangers",
               f"largest share of the images of the forgotten identities that one retained "
               f"identity attracts {threshold}, times the number of retained identities",
               "0 to the number of retained identities",
               "2 or less: nobody gets more than twice an equal share", "ours", "data"),
    )  # fmt: skip


# Defined as for classifiers, except for these words: key -> (title, formula).
_ADAPTED = {
    "impressions_fa": (
        "rank-1 on impressions", f"closed-set rank-1 on impressions of the forgotten identities "
        f"that unlearning never saw; {_GALLERY}"),
    "probe_forget": (
        "linear probe, forgotten identities", "accuracy on forgotten identities of a logistic "
        "regression for all identities, fitted to true labels on the embeddings"),
    "probe_retain": ("linear probe, other identities", "accuracy of it on other identities"),
    "cka_original_forget": (
        "CKA with the original, forgotten identities", "linear CKA of the embeddings with the "
        "original's, images of the forgotten identities"),
    "cka_original_retain": (
        "CKA with the original, other identities", "the same, images of the other identities"),
    "relearn_full_steps": (
        "steps to relearn", "Adam steps (1e-3, 32 shots each) on the encoder, with the templates "
        "in place, until rank-1 on held-out images of forgotten identities, mean of three "
        "measurements, is 80 % of the original's; the step limit if never"),
    "relearn_full_fa": (
        "rank-1 after relearning", "rank-1 of the forgotten identities then, mean of three"),
    "ain_full": ("Anamnesis Index", ""),
    "drift_backbone": (
        "weight change", "||W' - W|| / ||W|| over all parameters of the encoder"),
}  # fmt: skip

ENCODER_METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        *(
            Metric(f"rank1_{part}", f"rank-1, {words}", "identification",
                   f"images of the {words} whose most similar identity is their own / all of "
                   f"them; {_GALLERY}", _PERCENT,
                   "low" if part == "forget" else "high: the original's", _SOURCE, "data")
            for part, words in _PARTS
        ),
        *(metric for far in FARS for metric in _at(far)),
        Metric("identified_forget_original", "identified at the original's threshold",
               "identification",
               "images of the forgotten identities that are identified at the original's threshold "
               "of a false-accept rate of 1 %, as in a system whose threshold is not set anew",
               _PERCENT, "low; 3 % or less passes", "ours", "data"),
        *(
            Metric(f"reenrolled_rank1_{part}", f"rank-1 re-enrolled, {words}", "re-enrolment",
                   f"rank-1 of the {words}, with {_FRESH}", _PERCENT,
                   _GOLDEN if part == "forget" else "high", "ours", "data")
            for part, words in _PARTS
        ),
        *(
            Metric(f"reenrolled_tar_{part}", f"TAR re-enrolled at FAR 1 %, {words}",
                   "re-enrolment", f"TAR of the {words} at a false-accept rate of 1 %, with "
                   f"{_FRESH}", _PERCENT, _GOLDEN if part == "forget" else "high", "ours", "data")
            for part, words in _PARTS
        ),
        *(
            replace(BY_KEY[key], title=title, formula=formula or BY_KEY[key].formula)
            for key, (title, formula) in _ADAPTED.items()
        ),
    )
}  # fmt: skip

# The metrics of the short table.
ENCODER_MAIN = (
    "rank1_forget", "rank1_retain", "identified_forget_1e2", "identified_retain_1e2",
    "identified_forget_original", "identified_forget_1e3", "identified_retain_1e3",
    "tar_forget_1e2", "tar_retain_1e2", "tar_forget_1e3", "tar_retain_1e3", "accused_1e2",
    "strangers_1e2", "attraction_1e2", "impressions_fa", "reenrolled_rank1_forget",
    "reenrolled_rank1_retain", "reenrolled_tar_forget", "probe_forget", "probe_retain",
    "relearn_full_steps", "relearn_full_fa", "ain_full", "drift_backbone",
)  # fmt: skip
