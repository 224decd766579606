"""The two inner steps of unlearning as ops: one name each, whatever runs them.

``signed_cross_entropy`` and ``masked_cross_entropy`` return a loss that autograd differentiates;
``ascent_step_`` changes a batch of impressions in place. Their truth is `reference`.
"""

from .ascent_step import ascent_step_
from .masked_cross_entropy import masked_cross_entropy
from .signed_cross_entropy import signed_cross_entropy

__all__ = ["ascent_step_", "masked_cross_entropy", "signed_cross_entropy"]
