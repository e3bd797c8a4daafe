"""Block-sparse convolutions and linear layers, really fast under torch.compile."""

from . import passes
from .checkpoint import load_folded
from .explain import Explanation, explain
from .export import export
from .inspect_kernels import Inspection, inspect_kernels
from .passes.apply_pattern import apply_pattern
from .passes.fold_zero_blocks import fold_zero_blocks
from .passes.insert_block_scales import insert_block_scales
from .passes.prune_blocks import prune_blocks
from .pattern import BlockPattern, BlockSparseWeight
from .plan import Decision, Plan, Site
from .planning import plan
from .ramanujan import RamanujanBlocks
from .recommend import recommend_block_shape
from .recommendation import Recommendation
from .report import SparsityReport, sparsity_report
from .scales import freeze_scales, param_groups, proximal_step, scale_penalty
from .schedule import SparsitySchedule
from .schemes import PeriodicKernels, RandomBlocks, StructuredBand
from .sparsifier import BlockSparsifier
from .trace import trace

__version__ = "0.1.0"
__all__ = [
    "BlockPattern",
    "BlockSparseWeight",
    "BlockSparsifier",
    "Decision",
    "Explanation",
    "Inspection",
    "PeriodicKernels",
    "Plan",
    "RamanujanBlocks",
    "RandomBlocks",
    "Recommendation",
    "Site",
    "SparsityReport",
    "SparsitySchedule",
    "StructuredBand",
    "apply_pattern",
    "explain",
    "export",
    "fold_zero_blocks",
    "freeze_scales",
    "insert_block_scales",
    "inspect_kernels",
    "load_folded",
    "param_groups",
    "passes",
    "plan",
    "proximal_step",
    "prune_blocks",
    "recommend_block_shape",
    "scale_penalty",
    "sparsity_report",
    "trace",
]
