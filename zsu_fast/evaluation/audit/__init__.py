"""What was really forgotten: tests that a mask on the outputs does not pass."""

from .audit import audit
from .metrics import METRICS, Metric
from .result import Audit, Check, Finding, Layer, Row

__all__ = ["METRICS", "Audit", "Check", "Finding", "Layer", "Metric", "Row", "audit"]
