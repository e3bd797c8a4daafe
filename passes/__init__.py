"""Graph passes: one file, one pass, one name. `pipeline.PIPELINE` is the order they run in."""

from .choose_kernels import choose_kernels
from .find_sites import find_sites
from .fold_batch_norm import fold_batch_norm
from .fold_constants import fold_constants
from .lower_sites import lower_sites
from .pipeline import PIPELINE, PassContext, run_pipeline

__all__ = [
    "PIPELINE",
    "PassContext",
    "choose_kernels",
    "find_sites",
    "fold_batch_norm",
    "fold_constants",
    "lower_sites",
    "run_pipeline",
]
