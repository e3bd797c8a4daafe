"""Other people's block-sparse products on a GPU, where they can be imported. Linear layers only."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Product = Callable[[Tensor], Tensor]


def torch_bsr(weight: Tensor, block_shape: tuple[int, int]) -> Product:
    """torch's own."""
    sparse = weight.to_sparse_bsr(block_shape)
    return lambda x: torch.nn.functional.linear(x, sparse)


def torchao(weight: Tensor, block_shape: tuple[int, int]) -> Product:
    """torchao, up to 0.18."""
    from torchao.sparsity.blocksparse import BlockSparseTensor

    if block_shape[0] != block_shape[1]:
        raise ValueError("torchao has square blocks only")
    sparse = BlockSparseTensor.from_dense(weight, block_shape[0])
    return lambda x: torch.nn.functional.linear(x, sparse)


def stk(weight: Tensor, block_shape: tuple[int, int]) -> Product:
    """STK, from MegaBlocks."""
    import stk as library

    if block_shape != (128, 128):
        raise ValueError("STK has blocks of 128 only")
    sparse = library.ops.to_sparse(weight, 128)
    return lambda x: library.ops.dds(x, sparse.t())


LIBRARIES: dict[str, Callable[[Tensor, tuple[int, int]], Product]] = {
    "torch_bsr": torch_bsr,
    "torchao": torchao,
    "stk": stk,
}


def others(weight: Tensor, block_shape: tuple[int, int], x: Tensor) -> dict[str, Product]:
    """Those that run this layer, and agree with the dense product."""
    expected = torch.nn.functional.linear(x, weight)
    found = {}
    for name, make in LIBRARIES.items():
        try:
            product = make(weight, block_shape)
            error = float((product(x) - expected).float().norm() / expected.float().norm())
        except Exception as reason:
            log.info("%s does not run this layer: %s", name, reason)
            continue
        if error < 0.02:
            found[name] = product
        else:
            log.warning("%s is wrong by %.1e", name, error)
    return found
