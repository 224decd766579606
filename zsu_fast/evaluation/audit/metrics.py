"""Every metric of the audit: its formula, its range, which way is good, and its source.

To add one, add its `Metric` here and a `Row.put` of its key where it is measured. The report and
the JSON file carry this table, so that no number stands without a definition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """The definition of one number.

    Attributes:
        key: its name in `Row.values` and in JSON.
        title: its name in tables.
        group: the test it belongs to.
        formula: how it is computed, in words and symbols.
        range: its possible values, with the unit.
        good: which way is good, or what to compare with.
        source: who defined it; "ours" if nobody else did.
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
_GOLDEN = "close to the golden model's value, which is not 0"
_HELD_OUT = "impressions of the original that unlearning never saw"
_BACK = "with all of the original's last layer put back"
_PARTS = (("forget", "forgotten classes"), ("retain", "other classes"))
_TRAINED = (("last_layer", "last layer"), ("full", "all weights"))
METRICS: tuple[Metric, ...] = (
    Metric("fa", "FA", "outputs",
           "correctly classified images of the forgotten classes / all of them",
           _PERCENT, "low; a mask reaches 0 at no cost", "the paper, section 5", "data"),
    Metric("ra", "RA", "outputs",
           "correctly classified images of the other classes / all of them",
           _PERCENT, "high; compare with the mask and the original", "the paper, section 5",
           "data"),
    Metric("erasure_cost", "erasure cost", "outputs",
           "||W_r P||^2 / ||W_r||^2, the share of the retained logits' energy in the subspace that "
           "the forgotten logits read: W_r and W_f, the original's last-layer rows of other and of "
           "forgotten classes minus the mean row, with features whitened on impressions; P, the "
           "projector on the row space of W_f",
           "0 to 1", "descriptive: what a linear erasure of the forgotten classes takes from the "
           "other logits", "ours"),
    Metric("overall", "overall accuracy", "outputs",
           "correctly classified images / all images, including forgotten classes; forgetting "
           "lowers it", _PERCENT, "compare only with other overall accuracies",
           "the paper, section 5", "data"),
    Metric("leak", "leak", "outputs",
           "images of the forgotten classes classified as any forgotten class / all of them",
           _PERCENT, "low", "ours", "data"),
    Metric("impressions_fa", "FA on impressions", "outputs",
           f"FA on {_HELD_OUT}", _PERCENT, "low", "ours"),
    Metric("top_answer", "most frequent prediction", "outputs",
           "share of the most frequent prediction on images (without data: impressions) of the "
           "other classes, each class with the same weight",
           "100 / classes to 100 %", "low; 100 % is a model that always predicts one class",
           "ours"),
    Metric("unmask_fa", "un-mask FA", "un-mask",
           "FA with the original's last-layer rows of the forgotten classes put back",
           _PERCENT, "low (10 % or less passes); the mask's is the original's FA", "ours", "data"),
    Metric("unmask_ra", "un-mask RA", "un-mask",
           "RA with the original's last-layer rows of the forgotten classes put back",
           _PERCENT, "descriptive: whether the model still works with these rows", "ours",
           "data"),
    Metric("unmask_impressions_fa", "un-mask FA on impressions", "un-mask",
           f"un-mask FA on {_HELD_OUT}", _PERCENT, "low", "ours"),
    Metric("unmask_last_layer_fa", "FA, whole last layer back", "un-mask",
           f"FA {_BACK}", _PERCENT, _GOLDEN, "ours", "data"),
    Metric("unmask_last_layer_ra", "RA, whole last layer back", "un-mask",
           f"RA {_BACK}", _PERCENT,
           "below half of the original's, the FA beside it means nothing", "ours", "data"),
    Metric("unmask_last_layer_impressions_ra", "RA on impressions, last layer back", "un-mask",
           f"RA {_BACK}, on {_HELD_OUT}", _PERCENT,
           "below half of the original's, the FA beside it means nothing", "ours"),
    Metric("unmask_last_layer_impressions_fa", "FA on impressions, last layer back", "un-mask",
           f"FA {_BACK}, on {_HELD_OUT}", _PERCENT, _GOLDEN, "ours"),
    Metric("unmask_ff", "un-mask FF, among the forgotten", "un-mask",
           "images of the forgotten classes for which the original's last layer gives their class "
           "the largest of the k forgotten logits / all of them",
           "0 to 100 %; 100 / k is chance",
           f"{_GOLDEN}; a shift of all forgotten logits does not lower it", "ours", "data"),
    Metric("adapted_unmask_fa", "adapted un-mask FA", "un-mask",
           "FA of the original's last layer re-fitted on the model's features: ridge regression "
           "to its outputs on the original's features with the penalty on the change of the "
           "weights, fitted on at most 500 images and measured on others",
           _PERCENT, _GOLDEN, "ours", "data"),
    Metric("adapted_unmask_ra", "adapted un-mask RA", "un-mask",
           "RA of the same re-fitted last layer", _PERCENT,
           "descriptive: whether the model still works with it", "ours", "data"),
    Metric("agreement_kl", "KL from the masked original", "agreement",
           f"mean KL(mask || model) of the softmaxes on {_HELD_OUT}, other classes",
           "0 to 27.6 nats", "low: the retained outputs are unchanged",
           "ours; KL as in 2205.08096"),
    Metric("agreement_top1", "same prediction as the mask", "agreement",
           f"share of the mask's predictions that the model repeats on {_HELD_OUT}, other classes",
           _PERCENT, "high", "ours"),
    Metric("drift_backbone", "weight change before the last layer", "drift",
           "||W' - W|| / ||W|| over all parameters before the last layer",
           "0 and up", "0 means that the features are the original's", "ours"),
    Metric("drift_forget_rows", "last layer's change, forgotten rows", "drift",
           "||W' - W|| / ||W|| over weights and biases of the forgotten classes' rows",
           "0 and up", "descriptive", "ours"),
    Metric("drift_retain_rows", "last layer's change, other rows", "drift",
           "||W' - W|| / ||W|| over weights and biases of the other classes' rows",
           "0 and up", "0 beside changed forgotten rows is typical of a mask", "ours"),
    *(
        Metric(f"drift_features_{part}", f"feature change, {words}", "drift",
               f"mean ||f' - f||^2 / mean ||f - mean f||^2 of the last layer's input on "
               f"impressions of the {words}", "0 and up; about 2 for unrelated features",
               "0 means that nothing inside changed" if part == "forget"
               else "low: small side effects", "ours")
        for part, words in _PARTS
    ),
    Metric("cka_impressions", "CKA with the original, impressions", "representation",
           "linear CKA of the last layer's input with the original's, impressions of the "
           "forgotten classes",
           "0 to 1", "1 means the same features up to rotation and scale", "1905.00414"),
    Metric("resynthesis_hit", "reachable impressions", "re-synthesis",
           "ascents from noise towards forgotten classes that reach their target confidence "
           "(0.55 to 0.99) within 100 steps / all of them",
           _PERCENT, "low; 0 for a mask too", "ours, after 1908.10486"),
    Metric("resynthesis_steps", "steps to reach them", "re-synthesis",
           "mean steps of these ascents, 100 for one that never gets there",
           "1 to 100 steps", "high", "ours"),
    Metric("resynthesis_unmasked_steps", "steps to reach them, rows put back", "re-synthesis",
           "mean steps of these ascents with the original's rows of the forgotten classes put "
           "back", "1 to 100 steps", "descriptive: ascent reaches nearly any row", "ours"),
    Metric("probe_forget", "linear probe, forgotten classes", "probe",
           "accuracy on forgotten classes of a logistic regression for all classes, fitted to "
           "true labels on the last layer's input",
           _PERCENT, _GOLDEN, "2604.08271; 2605.20282", "data"),
    Metric("probe_retain", "linear probe, other classes", "probe",
           "accuracy of the same probe on the other classes", _PERCENT, "high", "2604.08271",
           "data"),
    Metric("knn_forget", "k-NN, forgotten classes", "representation",
           "accuracy on forgotten classes of the 10 nearest neighbours by cosine, on the last "
           "layer's input", _PERCENT, _GOLDEN, "2503.06991", "data"),
    Metric("knn_retain", "k-NN, other classes", "representation",
           "accuracy of the same k-NN on the other classes", _PERCENT, "high", "2503.06991",
           "data"),
    *(
        Metric(f"cka_{other}_{part}", f"CKA with the {other}, {words}", "representation",
               f"linear CKA of the last layer's input with the {other} model's, images of the "
               f"{words}", "0 to 1", good, source, needs)
        for other, needs in (("original", "data"), ("golden", "golden"))
        for part, words in _PARTS
        for good, source in [
            ("at least the original's value", "2503.06991") if other == "golden"
            else (_GOLDEN, "1905.00414; 2503.06991") if part == "forget"
            else ("high", "1905.00414")
        ]
    ),
    *(
        Metric(f"mia_{part}_{score}", f"membership AUC, {words}, {score}", "membership",
               f"AUC of {formula}, telling training from held-out images of {words}",
               "0 to 1; 0.5 is chance", _GOLDEN, "Yeom et al. 2018; 2403.01218", "train_data")
        for part, words in _PARTS
        for score, formula in (
            ("confidence", "the largest probability"),
            ("entropy", "minus the entropy of the softmax"),
            ("loss", "minus the cross-entropy of the true class"),
        )
    ),
    Metric("relearn_last_layer_steps", "steps to relearn, last layer", "relearn",
           "Adam steps (1e-3, 32 shots each) on the last layer until FA on held-out images, mean "
           "of three measurements, is 80 % of the original's; forgotten rows start at the mean "
           "of the others; the step limit if never", "1 to the step limit", _GOLDEN,
           "2201.05629, k-shot ours", "data"),
    Metric("relearn_full_steps", "steps to relearn, all weights", "relearn",
           "Adam steps on all weights to the same FA", "1 to the step limit", _GOLDEN,
           "2201.05629, k-shot ours", "data"),
    *(
        Metric(f"relearn_{trained}_fa", f"FA after relearning, {words}", "relearn",
               "FA at the end of relearning, mean of three measurements", _PERCENT, "descriptive",
               "ours", "data")
        for trained, words in _TRAINED
    ),
    *(
        Metric(f"ain_{trained}", f"Anamnesis Index, {words}", "relearn",
               "steps to relearn / the golden model's", "0 and up",
               "near 1; below 0.5 the model still holds the classes, far above 1 is suspicious",
               "2201.05629", "golden")
        for trained, words in _TRAINED
    ),
    *(
        Metric(f"{kind}_{other}_{part}", f"{title} to the {other}, {words}", "distances",
               f"mean {formula} of the softmaxes, images of {words}", values,
               "low" if other == "golden" or part == "retain" else "descriptive", source,
               "golden" if other == "golden" else "data")
        for other in ("mask", "golden")
        for part, words in _PARTS
        for kind, title, formula, values, source in (
            ("kl", "KL", f"KL({other} || model)", "0 to 27.6 nats", "2205.08096"),
            ("js", "JS", f"Jensen-Shannon divergence from the {other}", "0 to 0.693 nats",
             "2205.08096"),
            ("activation", "activation distance", f"L2 distance from the {other}", "0 to 1.414",
             "Golatkar et al. 2020"),
        )
    ),
)  # fmt: skip
BY_KEY: dict[str, Metric] = {m.key: m for m in METRICS}

_AT_HALF = "with a probability of at least one half"
_LABELS = f"labels of the forgotten classes that are predicted {_AT_HALF} / all of them"
_MEAN_AP = "mean average precision (AP) of the retained classes"
_ON_IMPRESSIONS = f"impressions of the forgotten classes that are predicted {_AT_HALF} / all"
# What differs in the audit of a multi-label model: title ("" for the same), and formula.
_MULTI_LABEL = {
    "fa": ("", _LABELS),
    "ra": ("RA (mean AP)", _MEAN_AP),
    "impressions_fa": ("", f"{_ON_IMPRESSIONS}; {_HELD_OUT}"),
    "unmask_fa": ("", f"{_LABELS}, with the original's last-layer rows of these classes put back"),
    "unmask_ra": ("un-mask RA (mean AP)", f"{_MEAN_AP}, with these rows put back"),
    "unmask_impressions_fa": ("", f"{_ON_IMPRESSIONS}, with these rows put back"),
    "unmask_last_layer_fa": ("", f"{_LABELS}, {_BACK}"),
    "unmask_last_layer_ra": ("RA (mean AP), whole last layer back", f"{_MEAN_AP}, {_BACK}"),
    "unmask_last_layer_impressions_fa": ("", f"{_ON_IMPRESSIONS}, {_BACK}"),
    "unmask_last_layer_impressions_ra": (
        "", f"impressions of the retained classes that are predicted {_AT_HALF}, {_BACK} / all"),
    "adapted_unmask_fa": (
        "", f"{_LABELS}, by the original's last layer re-fitted on the model's features as for "
        "other models"),
    "adapted_unmask_ra": ("adapted un-mask RA (mean AP)", f"{_MEAN_AP} of the same layer"),
    "agreement_top1": (
        "same decisions as the mask", "mean over impressions of retained classes of the share of "
        "retained decisions that are the mask's, those for and against a class with the same "
        "weight"),
    "probe_forget": (
        "linear probe, forgotten classes (mean AP)", "mean AP of the forgotten classes of a "
        "logistic regression per class, fitted to true labels on the last layer's input"),
    "probe_retain": (
        "linear probe, other classes (mean AP)", "mean AP of the same probe on the other classes"),
}  # fmt: skip


def definitions(multi_label: bool) -> dict[str, Metric]:
    """The definition of each metric, by its key, in the audit of a model of either kind."""
    if not multi_label:
        return BY_KEY
    changed = {
        key: replace(BY_KEY[key], title=title or BY_KEY[key].title, formula=formula)
        for key, (title, formula) in _MULTI_LABEL.items()
    }
    return BY_KEY | changed
