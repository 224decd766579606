"""The fixed names in an audit: of models, findings and checks. Code, tests and JSON share them."""

from __future__ import annotations

from typing import Literal

# The rows of an audit, in the order of its tables.
ORIGINAL = "original"
MASK = "mask"
RANDOM = "random embeddings"
UNLEARNED = "unlearned"
GOLDEN = "golden"
MODELS = (ORIGINAL, MASK, RANDOM, UNLEARNED, GOLDEN)

# What the un-mask test restores of the original's last layer: the rows of the forgotten classes, or
# the whole layer.
Restored = Literal["rows", "last layer"]
# The prefix of the metrics with that part restored.
UNMASK_PREFIXES: dict[Restored, str] = {"rows": "unmask", "last layer": "unmask_last_layer"}
# The weights that relearning trains, and the words for them.
Trained = Literal["last_layer", "full"]
TRAINED_WORDS: dict[Trained, str] = {"last_layer": "last layer", "full": "all weights"}


class FindingName:
    """What an audit can recognise in an unlearned model."""

    UNTOUCHED = "untouched"
    ONE_CLASS = "one class only"
    MASK = "mask"
    SHUFFLED = "shuffled last layer"
    NOISE = "noise in the last layer"
    OUTPUT_LEVEL = "output level"
    HIDDEN = "hidden by the last layer"
    FEATURES_KEPT = "features kept"
    DAMAGED = "damaged"
    NOT_FORGOTTEN = "not forgotten"


class CheckName:
    """The tests that an unlearned model passes or fails."""

    OUTPUTS = "outputs"
    RETAINED = "retained classes"
    UNMASK = "un-mask"
    FEATURES = "features changed"
    LAST_LAYER = "no trick in the last layer"
    RESYNTHESIS = "re-synthesis"
    PROBE = "linear probe"
    KNN = "k-NN"
    MEMBERSHIP = "membership inference"
    RELEARN_LAST_LAYER = "relearning (last layer)"
    RELEARN_FULL = "relearning (all weights)"
    DIVERGENCE = "outputs like the golden model's"
