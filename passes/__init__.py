"""Passes: one file, one pass, one name.

Graph passes take an FX graph; `pipeline.PIPELINE` is the order they run in for
inference; `choose_training` and `lower_training` are their counterparts for training. Model passes
(`insert_block_scales`, `apply_pattern`, `prune_blocks`, `fold_zero_blocks`) take an `nn.Module`, change it
in place and return it.
"""

from .apply_pattern import apply_pattern
from .choose_chains import choose_chains
from .choose_kernels import choose_kernels
from .choose_layouts import choose_layouts
from .choose_training import choose_training
from .find_sites import find_sites
from .fold_batch_norm import fold_batch_norm
from .fold_constants import fold_constants
from .fold_pads import fold_pads
from .fold_zero_blocks import fold_zero_blocks
from .fuse_chains import fuse_chains
from .fuse_depthwise import choose_fusions, fuse_depthwise
from .insert_block_scales import insert_block_scales
from .lower_quantized import lower_quantized
from .lower_sites import lower_sites
from .lower_training import lower_training
from .permute_channels import permute_channels
from .pipeline import PIPELINE, PassContext, run_pipeline
from .prune_blocks import prune_blocks

__all__ = [
    "PIPELINE",
    "PassContext",
    "apply_pattern",
    "choose_chains",
    "choose_fusions",
    "choose_kernels",
    "choose_layouts",
    "choose_training",
    "find_sites",
    "fold_batch_norm",
    "fold_constants",
    "fold_pads",
    "fold_zero_blocks",
    "fuse_chains",
    "fuse_depthwise",
    "insert_block_scales",
    "lower_quantized",
    "lower_sites",
    "lower_training",
    "permute_channels",
    "prune_blocks",
    "run_pipeline",
]
