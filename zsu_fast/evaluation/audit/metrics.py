"""Every metric of the audit: what it is, its formula, its range, which way is good, its source.

The report and the JSON file carry this list, so that no number stands without a definition.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """The definition of one number.

    Attributes:
        key: its name in `Row.values` and in JSON.
        title: its name for people.
        group: the test it belongs to.
        formula: how it is computed, in words and symbols.
        range: the values it can take, with the unit.
        good: which way is good, or what to compare with.
        source: who defined it; "ours" where nobody else did.
        needs: "" if the models are enough, else "data", "train_data" or "golden".
    """

    key: str
    title: str
    group: str
    formula: str
    range: str
    good: str
    source: str
    needs: str = ""


_PERCENT = "0 to 100 %"
_GOLDEN = "near the golden model's, which is not 0"
_HELD = "impressions of the original made by another seed than the run's"
METRICS: tuple[Metric, ...] = (
    # --- outputs -----------------------------------------------------------------------------
    Metric("fa", "FA", "outputs",
           "images of the forgotten classes answered right / all of them",
           _PERCENT, "low; a mask has 0 for nothing", "the paper, section 5", "data"),
    Metric("ra", "RA", "outputs",
           "images of the other classes answered right / all of them",
           _PERCENT, "high, against the mask's and the original's", "the paper, section 5", "data"),
    Metric("overall", "overall", "outputs",
           "images answered right / all images, forgotten classes included: has to fall",
           _PERCENT, "compare with nothing but overall", "the paper, section 5", "data"),
    Metric("leak", "still answered", "outputs",
           "images of the forgotten classes answered with any forgotten class / all of them",
           _PERCENT, "low", "ours", "data"),
    Metric("impressions_fa", "FA on impressions", "outputs",
           f"FA on {_HELD}", _PERCENT, "low", "ours"),
    Metric("top_answer", "most frequent answer", "outputs",
           "share of the most frequent answer on images (without data: impressions) of the other "
           "classes, each class counted alike",
           "100 / classes to 100 %", "low: 100 % is a model that says one thing", "ours"),
    # --- un-mask -----------------------------------------------------------------------------
    Metric("unmask_fa", "un-mask FA", "un-mask",
           "FA with the original's last-layer rows of the forgotten classes put back",
           _PERCENT, "low (10 % or less passes); the mask's is the original's FA", "ours", "data"),
    Metric("unmask_ra", "un-mask RA", "un-mask",
           "RA with the original's last-layer rows of the forgotten classes put back",
           _PERCENT, "only says whether the model still works then", "ours", "data"),
    Metric("unmask_impressions_fa", "un-mask FA on impressions", "un-mask",
           f"un-mask FA on {_HELD}", _PERCENT, "low", "ours"),
    Metric("whole_head_fa", "FA, whole last layer back", "un-mask",
           "FA with all of the original's last layer put back",
           _PERCENT, _GOLDEN, "ours", "data"),
    Metric("whole_head_ra", "RA, whole last layer back", "un-mask",
           "RA with all of the original's last layer put back",
           _PERCENT, "below half of the original's, FA says nothing", "ours", "data"),
    Metric("whole_head_impressions_ra", "RA, the same on impressions", "un-mask",
           f"RA with all of the original's last layer put back, on {_HELD}",
           _PERCENT, "below half of the original's, FA says nothing", "ours"),
    Metric("whole_head_impressions_fa", "FA, the same on impressions", "un-mask",
           f"FA with all of the original's last layer put back, on {_HELD}",
           _PERCENT, _GOLDEN, "ours"),
    # --- agreement with the mask, on impressions ---------------------------------------------
    Metric("agreement_kl", "KL from the masked original", "agreement",
           f"mean KL(mask || model) of the softmaxes on {_HELD} of the other classes",
           "0 to 27.6 nats", "low: retained answers are kept", "ours; KL as in 2205.08096"),
    Metric("agreement_top1", "answers as the mask does", "agreement",
           f"share of {_HELD} of the other classes with the mask's answer",
           _PERCENT, "high", "ours"),
    # --- drift -------------------------------------------------------------------------------
    Metric("drift_backbone", "weights before the last layer moved", "drift",
           "||W' - W|| / ||W|| over all parameters before the last layer",
           "0 and up", "0 means: the features are the original's", "ours"),
    Metric("drift_forget_rows", "last layer's forgotten rows moved", "drift",
           "||W' - W|| / ||W|| over weights and biases of the forgotten classes' rows",
           "0 and up", "descriptive", "ours"),
    Metric("drift_retain_rows", "last layer's other rows moved", "drift",
           "||W' - W|| / ||W|| over weights and biases of the other classes' rows",
           "0 and up", "0 with moved forgotten rows is a mask", "ours"),
    Metric("drift_features_forget", "features moved, forgotten classes", "drift",
           "mean ||f' - f||^2 / mean ||f - mean f||^2 of the last layer's input on impressions "
           "of the forgotten classes",
           "0 and up; about 2 for unrelated features", "0 means: nothing inside changed", "ours"),
    Metric("drift_features_retain", "features moved, other classes", "drift",
           "the same on impressions of the other classes",
           "0 and up; about 2 for unrelated features", "low for little side effect", "ours"),
    Metric("cka_impressions", "CKA with the original, impressions", "representation",
           "linear CKA of the last layer's input with the original's, impressions of the "
           "forgotten classes",
           "0 to 1", "1 means: the same features up to rotation and scale", "1905.00414"),
    # --- re-synthesis ------------------------------------------------------------------------
    Metric("resynthesis_hit", "impressions still reachable", "re-synthesis",
           "ascent from noise towards forgotten classes that reaches its confidence (0.55 to "
           "0.99) within 100 steps / attempts",
           _PERCENT, "low; 0 for a mask too", "ours, after 1908.10486"),
    Metric("resynthesis_steps", "steps to reach them", "re-synthesis",
           "mean ascent steps of these attempts, 100 for one that never does",
           "1 to 100 steps", "high", "ours"),
    Metric("resynthesis_unmasked_steps", "the same, rows put back", "re-synthesis",
           "the same with the original's rows of the forgotten classes put back",
           "1 to 100 steps", "descriptive: ascent reaches nearly any row", "ours"),
    # --- features, with data -----------------------------------------------------------------
    Metric("probe_forget", "linear probe, forgotten classes", "probe",
           "accuracy on forgotten classes of a logistic regression of all classes, fitted on the "
           "last layer's input with true labels",
           _PERCENT, _GOLDEN, "2604.08271; 2605.20282", "data"),
    Metric("probe_retain", "linear probe, other classes", "probe",
           "the same probe's accuracy on the other classes", _PERCENT, "high", "2604.08271",
           "data"),
    Metric("knn_forget", "k-NN, forgotten classes", "representation",
           "accuracy on forgotten classes of the 10 nearest neighbours by cosine, last layer's "
           "input", _PERCENT, _GOLDEN, "2503.06991", "data"),
    Metric("knn_retain", "k-NN, other classes", "representation",
           "the same on the other classes", _PERCENT, "high", "2503.06991", "data"),
    Metric("cka_original_forget", "CKA with the original, forgotten classes", "representation",
           "linear CKA of the last layer's input with the original's, images of the forgotten "
           "classes", "0 to 1", _GOLDEN, "1905.00414; 2503.06991", "data"),
    Metric("cka_original_retain", "CKA with the original, other classes", "representation",
           "the same on the other classes", "0 to 1", "high", "1905.00414", "data"),
    Metric("cka_golden_forget", "CKA with the golden, forgotten classes", "representation",
           "linear CKA of the last layer's input with the golden model's, images of the "
           "forgotten classes", "0 to 1", "at least the original's", "2503.06991", "golden"),
    Metric("cka_golden_retain", "CKA with the golden, other classes", "representation",
           "the same on the other classes", "0 to 1", "at least the original's", "2503.06991",
           "golden"),
    # --- membership --------------------------------------------------------------------------
    *(
        Metric(f"mia_{part}_{score}", f"membership AUC, {words}, {score}", "membership",
               f"AUC of {what} telling training from held-out images of {words}",
               "0 to 1, 0.5 tells nothing", _GOLDEN, "Yeom et al. 2018; 2403.01218", "train_data")
        for part, words in (("forget", "forgotten classes"), ("retain", "other classes"))
        for score, what in (
            ("confidence", "the largest probability"),
            ("entropy", "minus the entropy of the softmax"),
            ("loss", "minus the cross-entropy of the true class"),
        )
    ),
    # --- relearning --------------------------------------------------------------------------
    Metric("relearn_head_steps", "steps to relearn, last layer", "relearn",
           "Adam steps (1e-3, 32 shots each) on the last layer until FA on held-out images, mean "
           "of three looks, is 80 % of the original's; forgotten rows start at the mean of the "
           "others; the most steps if never", "1 to the most steps", _GOLDEN,
           "2201.05629, k-shot ours", "data"),
    Metric("relearn_full_steps", "steps to relearn, all weights", "relearn",
           "the same with all weights", "1 to the most steps", _GOLDEN,
           "2201.05629, k-shot ours", "data"),
    Metric("relearn_head_fa", "FA after relearning, last layer", "relearn",
           "FA when it ended, mean of three looks", _PERCENT, "descriptive", "ours", "data"),
    Metric("relearn_full_fa", "FA after relearning, all weights", "relearn",
           "FA when it ended, mean of three looks", _PERCENT, "descriptive", "ours", "data"),
    Metric("ain_head", "Anamnesis Index, last layer", "relearn",
           "steps to relearn / the golden model's", "0 and up",
           "near 1; below 0.5 something is kept, far above is suspicious", "2201.05629", "golden"),
    Metric("ain_full", "Anamnesis Index, all weights", "relearn",
           "steps to relearn / the golden model's", "0 and up",
           "near 1; below 0.5 something is kept, far above is suspicious", "2201.05629", "golden"),
    # --- output distances --------------------------------------------------------------------
    *(
        Metric(f"{kind}_{other}_{part}", f"{title} to the {other}, {words}", "distances",
               f"mean {formula} of the softmaxes, images of {words}", span,
               "low" if other == "golden" or part == "retain" else "descriptive", source,
               "golden" if other == "golden" else "data")
        for other in ("mask", "golden")
        for part, words in (("forget", "forgotten classes"), ("retain", "other classes"))
        for kind, title, formula, span, source in (
            ("kl", "KL", f"KL({other} || model)", "0 to 27.6 nats", "2205.08096"),
            ("js", "JS", f"Jensen-Shannon divergence from the {other}", "0 to 0.693 nats",
             "2205.08096"),
            ("activation", "activation distance", f"L2 distance from the {other}", "0 to 1.414",
             "Golatkar et al. 2020"),
        )
    ),
)  # fmt: skip
BY_KEY: dict[str, Metric] = {m.key: m for m in METRICS}
