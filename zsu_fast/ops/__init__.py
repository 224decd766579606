"""The two inner steps of unlearning as ops: one name each, whatever runs them.

``signed_cross_entropy`` and ``masked_cross_entropy`` return a loss that autograd differentiates;
``ascent_step_`` changes a batch of impressions in place. Their truth is `reference`; `backends`
chooses what runs them.
"""

from .ascent_step import ascent_step_
from .backends import BackendUnavailable, use_backend
from .masked_cross_entropy import masked_cross_entropy, masked_cross_entropy_and_grad
from .signed_cross_entropy import signed_cross_entropy, signed_cross_entropy_and_grad

__all__ = [
    "BackendUnavailable",
    "ascent_step_",
    "masked_cross_entropy",
    "masked_cross_entropy_and_grad",
    "signed_cross_entropy",
    "signed_cross_entropy_and_grad",
    "use_backend",
]
