"""What was really forgotten: tests that a mask on the outputs does not pass.

In: the models and the forgotten classes. Without images the audit runs the un-mask test, agreement
with the mask, drift, re-synthesis and the erasure cost; with labelled images also accuracies,
confusion, the adapted un-mask test, accuracy among the forgotten classes, linear probe, k-NN, CKA,
relearn time and output divergences; with training images membership inference.
Out: an `Audit`. Read ``audit.py`` first, then ``metrics.py`` and ``checks.py``; for encoders with a
gallery ``encoder.py``, ``encoder_metrics.py`` and ``encoder_checks.py``.
"""

from .audit import audit
from .metrics import METRICS, Metric
from .result import (
    Audit,
    Check,
    CheckName,
    EncoderCheckName,
    Finding,
    FindingName,
    Layer,
    Row,
)

__all__ = [
    "METRICS", "Audit", "Check", "CheckName", "EncoderCheckName", "Finding", "FindingName",
    "Layer", "Metric", "Row", "audit",
]  # fmt: skip
