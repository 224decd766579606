"""zsu_fast: make a trained image classifier forget classes, without any training data."""

from .errors import (
    ArgumentError,
    CheckpointError,
    LedgerError,
    ModelError,
    OutputError,
    RankError,
    UnlearningWarning,
    VerdictError,
    ZsuFastError,
)
from .evaluation.accuracy import Evaluation, evaluate, mask
from .evaluation.audit.audit import audit
from .evaluation.audit.result import Audit
from .evaluation.baselines import random_embeddings
from .evaluation.check import check
from .evaluation.encoder_evaluation import EncoderEvaluation
from .evaluation.enrolment import enroll
from .evaluation.multi_label import MultiLabelEvaluation
from .evaluation.verdict import Verdict
from .models.compact import compact
from .models.delta import apply_delta, save_delta
from .models.embedding_classifier import EmbeddingClassifier
from .models.gallery import Gallery
from .models.input_spec import InputSpec
from .options import paper_preset
from .planning.doctor import doctor
from .planning.plan import Plan, plan
from .provenance.folders import save_pretrained
from .provenance.ledger import Ledger
from .runtime.progress import Event
from .split_model import split
from .splitting.split import Split
from .synthesis.impressions import ClassImpressions
from .synthesis.synthesize import synthesize
from .unlearner import ZeroShotUnlearner, unlearn
from .version import VERSION

__version__ = VERSION

__all__ = [
    "ArgumentError",
    "Audit",
    "CheckpointError",
    "ClassImpressions",
    "EmbeddingClassifier",
    "EncoderEvaluation",
    "Evaluation",
    "Event",
    "Gallery",
    "InputSpec",
    "Ledger",
    "LedgerError",
    "ModelError",
    "MultiLabelEvaluation",
    "OutputError",
    "Plan",
    "RankError",
    "Split",
    "UnlearningWarning",
    "Verdict",
    "VerdictError",
    "ZeroShotUnlearner",
    "ZsuFastError",
    "__version__",
    "apply_delta",
    "audit",
    "check",
    "compact",
    "doctor",
    "enroll",
    "evaluate",
    "mask",
    "paper_preset",
    "plan",
    "random_embeddings",
    "save_delta",
    "save_pretrained",
    "split",
    "synthesize",
    "unlearn",
]
