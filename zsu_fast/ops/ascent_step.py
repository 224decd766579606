"""One step of gradient ascent on a batch of class impressions (paper, equation 3)."""

from __future__ import annotations

from .reference import ascent_step_

__all__ = ["ascent_step_"]
