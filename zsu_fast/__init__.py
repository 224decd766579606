"""zsu_fast: make a trained image classifier forget classes, without any training data."""

from .audit import Audit, audit
from .baselines import random_embeddings
from .classifier import InputSpec
from .delta import apply_delta, save_delta
from .doctor import doctor
from .errors import (
    ArgumentError,
    CheckpointError,
    LedgerError,
    ModelError,
    OutputError,
    RankError,
    ZsuFastError,
)
from .evaluation import Evaluation, evaluate, mask
from .impressions import ClassImpressions, synthesize
from .ledger import Ledger
from .plan import Plan, plan
from .progress import Event
from .tail import Split
from .unlearning import ZeroShotUnlearner, paper_preset, split, unlearn
from .version import VERSION

__version__ = VERSION

__all__ = [
    "ArgumentError",
    "Audit",
    "CheckpointError",
    "ClassImpressions",
    "Evaluation",
    "Event",
    "InputSpec",
    "Ledger",
    "LedgerError",
    "ModelError",
    "OutputError",
    "Plan",
    "RankError",
    "Split",
    "ZeroShotUnlearner",
    "ZsuFastError",
    "__version__",
    "apply_delta",
    "audit",
    "doctor",
    "evaluate",
    "mask",
    "paper_preset",
    "plan",
    "random_embeddings",
    "save_delta",
    "split",
    "synthesize",
    "unlearn",
]
