"""Agreement between the processes of a data-parallel training."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import LayerError


def several() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_same_masks(names: Sequence[str], masks: Sequence[Tensor]) -> None:
    """A collective call; does nothing in a single process.

    Raises:
        LayerError: naming the first layer whose mask differs between ranks, or if a rank does not answer.
    """
    if not several():
        return
    digests = torch.tensor([zlib.crc32(mask.cpu().numpy().tobytes()) for mask in masks])
    digests = digests.to(masks[0].device)
    low, high = digests.clone(), digests.clone()
    try:
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LayerError(
            f"rank {dist.get_rank()}",
            f"an answer from all {dist.get_world_size()} ranks",
            f"none: {reason}",
            "A process has died or hangs: its own log has the cause. Restart all ranks from a checkpoint.",
        ) from error
    for name, differs in zip(names, (low != high).tolist(), strict=True):
        if differs:
            raise LayerError(
                name,
                "the same mask on all ranks",
                "different ones",
                "Seed all ranks alike, wrap the model in DDP or fully_shard, and call step on every rank.",
            )
