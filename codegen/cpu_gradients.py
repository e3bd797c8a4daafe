"""`blocksparse::weight_grad` as a C++ kernel."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from ..training_ops import WeightGradArguments
from ..window import Window
from .conv_inputs import conv_geometry
from .gradient_template import GradientTile, TileGradientTemplate
from .inductor_api import ir, parallel_num_threads, pick_vec_isa
from .lowering_errors import Unsupported
from .tiling import ConvGeometry, Size, as_int, equal, is_static
from .views import images_of_one_row, kernel_inputs, reshape

PANEL_BYTES = 512 * 1024
"""Packed at once by each thread: half of a usual L2 cache."""
FEWEST_PIXELS, MOST_PIXELS = 48, 256
"""Of a chunk. Fewer would not pay for loading and storing the sums; more, and a panel leaves L1."""


def gradient_tile(block_shape: tuple[int, int]) -> GradientTile | None:
    """The register tile for blocks `(bh, bw)` on this machine; None if there is none."""
    bh, bw = block_shape
    isa = pick_vec_isa()
    lanes = isa.nelements() if isa else 4
    registers = 32 if lanes == 16 else 16
    while lanes >= 4 and bw % lanes:
        lanes //= 2
    if lanes < 4 or bh % 4:
        return None
    vectors = 2 if bw % (2 * lanes) == 0 else 1
    rows = max(r for r in (16, 8, 4) if bh % r == 0 and (r == 4 or r * vectors + vectors + 2 <= registers))
    return GradientTile(lanes, vectors, rows)


def lower_weight_grad(args: WeightGradArguments) -> Any:
    (bh, bw), grad, x, window = args.block_shape, args.grad, args.x, args.window
    if window.dims == 1:
        grad, x, window = images_of_one_row(grad), images_of_one_row(x), window.of_one_row()
    channel_dim = 1 if window.dims else -1
    out_channels, in_channels = (as_int(t.get_size()[channel_dim]) for t in (grad, x))
    tile = gradient_tile((bh, bw))
    if x.get_device().type != "cpu" or {t.get_dtype() for t in (x, grad)} != {torch.float32}:
        raise Unsupported(f"no kernel for {x.get_dtype()} on {x.get_device()}")
    if tile is None or out_channels % bh or in_channels % bw:
        raise Unsupported(f"blocks of {bh}x{bw} on {out_channels}x{in_channels} channels")
    if window.dims not in (0, 2):
        raise Unsupported(f"{window.dims} spatial dimensions")
    images: Size = 1
    if window.dims:
        x, grad = _channels_last(x), _packed(_channels_last(grad))
        images, conv = _conv2d(grad, x, window)
        if conv.is_flat(images):
            conv = _flat(images * conv.output_size[0] * conv.output_size[1], conv.input_strides[2])
            images = 1
    else:
        pixels = as_int(sympy.prod(x.get_size()[:-1]))
        x, grad = (
            ir.ExternKernel.require_contiguous(reshape(t, [pixels, c]))
            for t, c in ((x, in_channels), (grad, out_channels))
        )
        conv = _flat(pixels, in_channels)
    nodes = kernel_inputs([grad, x, args.tile_index])
    tiles = int(args.tile_index.get_size()[1])
    threads = parallel_num_threads()
    chunk = chunk_rows(images, conv, out_channels + in_channels, threads)
    template = TileGradientTemplate(
        nodes,
        ir.FixedLayout(x.get_device(), x.get_dtype(), [tiles, bh, bw]),
        threads,
        images=images,
        conv=conv,
        channels=(out_channels, in_channels),
        tile=tile,
        chunk=chunk,
        tile_threads=tile_threads(images, conv, chunk, threads),
    )
    return template.generate().output_node()


def chunk_rows(images: Size, conv: ConvGeometry, channels: int, threads: int) -> int:
    """Output rows to pack at once."""
    oh, ow = conv.output_size
    if not is_static(ow):
        return 4
    most = min(MOST_PIXELS, max(FEWEST_PIXELS, PANEL_BYTES // (4 * channels)))
    rows = max(1, most // int(ow))
    if not is_static(oh):
        return rows
    chunks = -(-int(oh) // rows)
    if is_static(images) and images * chunks > 1:  # equal shares for all threads
        each = max(1, threads // int(images)) if images < threads else 1
        chunks = -(-chunks // each) * each
    return -(-int(oh) // chunks)


def tile_threads(images: Size, conv: ConvGeometry, chunk: int, threads: int) -> int:
    """Threads that share tiles, because there are too few pixels to share."""
    if not is_static(images) or not is_static(conv.output_size[0]):
        return 1
    chunks = int(images) * -(-int(conv.output_size[0]) // chunk)
    divisors = [n for n in range(1, threads + 1) if threads % n == 0]
    return min(divisors, key=lambda n: (-(-chunks // (threads // n)) / n, n))


def _channels_last(t: Any) -> Any:
    t.realize()
    t = ir.ExternKernel.require_channels_last(t)
    if as_int(t.get_stride()[1]) != 1:
        raise Unsupported(f"strides {t.get_stride()}")
    return t


def _packed(t: Any) -> Any:
    """Channels-last without gaps."""
    _, channels, height, width = t.get_size()
    expected = (height * width * channels, 1, width * channels, channels)
    dense = all(n == 1 or equal(s, e) for n, s, e in zip(t.get_size(), t.get_stride(), expected, strict=True))
    return t if dense else _channels_last(ir.ExternKernel.copy_input(t))


def _conv2d(grad: Any, x: Any, window: Window) -> tuple[Size, ConvGeometry]:
    image_stride, _, row_stride, pixel_stride = map(as_int, x.get_stride())
    if not is_static(pixel_stride):
        raise Unsupported(f"strides {x.get_stride()} of the input")
    n, _, *size = x.get_size()
    strides = (image_stride, row_stride, pixel_stride)
    return as_int(n), conv_geometry(size, grad.get_size()[2:], strides, window)


def _flat(pixels: Size, step: int) -> ConvGeometry:
    """Pixels one below the other: rows can be cut anywhere."""
    return ConvGeometry((pixels, 1), (pixels, 1), (0, step, step))
