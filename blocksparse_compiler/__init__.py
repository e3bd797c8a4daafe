"""Block-sparse convolutions and linear layers, really fast under torch.compile."""

from .pattern import BlockPattern, BlockSparseWeight
from .plan import Decision, Plan, Site

__version__ = "0.1.0"
__all__ = ["BlockPattern", "BlockSparseWeight", "Decision", "Plan", "Site"]
