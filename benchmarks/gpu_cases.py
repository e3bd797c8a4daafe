"""What the GPU benchmark measures: layers, masks, and the ways to run each; in order of importance."""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from blocksparse_compiler import BlockPattern, Site
from blocksparse_compiler.packing import PackedWeight
from blocksparse_compiler.variants import VARIANTS, KernelConfig, Parameters

from .masks import balanced_mask, random_mask
from .shapes import CONVOLUTIONS, ConvShape, LinearShape, Shape

BLOCKS = {"64x64": (64, 64), "64x32": (64, 32), "32x32": (32, 32), "128x128": (128, 128)}
DENSITIES = (0.5, 0.25, 0.1, 1.0)
BATCHES = (256, 64)
DECODE_ROWS = (1, 4, 16)
PREFILL_ROWS = 2048

SPATIAL = tuple(shape for shape in CONVOLUTIONS if shape.kernel == 3)
POINTWISE = tuple(shape for shape in CONVOLUTIONS if shape.kernel == 1)
VIT = (LinearShape(768, 3072, 197), LinearShape(3072, 768, 197), LinearShape(768, 768, 197))
LLAMA = (LinearShape(4096, 14336, 1), LinearShape(14336, 4096, 1))
TINY = (ConvShape(32, 4, 32, 3), LinearShape(64, 32, 1))
"""For a run without a GPU."""


@dataclass(frozen=True)
class Cell:
    """One layer with one mask.

    Args:
        batch: images, or rows of a linear layer divided by `shape.rows_per_item`.
        block: of the mask, as in `"64x64"`.
        density: kept fraction of its blocks.
        mask: `"random"`, or `"balanced"`: equally many blocks in every block row.
    """

    shape: Shape
    batch: int
    block: str
    density: float
    dtype: str = "bfloat16"
    mask: str = "random"

    def __str__(self) -> str:
        mask = "" if self.mask == "random" else f" {self.mask}"
        return f"{self.shape} n{self.batch} {self.block} {self.density:g}{mask}"

    @property
    def is_conv(self) -> bool:
        return isinstance(self.shape, ConvShape)

    @property
    def block_shape(self) -> tuple[int, int]:
        rows, columns = self.block.split("x")
        return int(rows), int(columns)

    @property
    def pixels(self) -> int:
        """Rows of the matrix product."""
        if isinstance(self.shape, ConvShape):
            return self.batch * self.shape.out_size**2
        return self.batch * self.shape.rows_per_item

    @property
    def dense_flops(self) -> float:
        return 2.0 * self.pixels * self.weight_elements

    @property
    def weight_elements(self) -> int:
        return math.prod(self.shape.weight_shape)

    def weight(self) -> Tensor:
        """The masked weight, on the GPU if there is one: the same in every process."""
        return _weight(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def input(self, device: str) -> Tensor:
        x = torch.randn(self.input_shape, device=device, dtype=self.torch_dtype)
        return x.to(memory_format=torch.channels_last) if self.is_conv else x

    @property
    def input_shape(self) -> tuple[int, ...]:
        if isinstance(self.shape, ConvShape):
            return (self.batch, self.shape.in_channels, self.shape.size, self.shape.size)
        return (self.pixels, self.shape.in_features)

    def site(self) -> Site:
        """The layer as the planner sees it, on a GPU."""
        common: dict[str, Any] = {
            "name": str(self.shape),
            "node": "",
            "input_shape": self.input_shape,
            "dtype": self.dtype,
            "device": "cuda",
        }
        if isinstance(self.shape, LinearShape):
            out, channels = self.shape.out_features, self.shape.in_features
            return Site(op="linear", out_channels=out, in_channels=channels, kernel_size=(), **common)
        shape, pad = self.shape, self.shape.kernel // 2
        return Site(
            op="conv2d",
            out_channels=shape.out_channels,
            in_channels=shape.in_channels,
            kernel_size=(shape.kernel,) * 2,
            stride=(shape.stride,) * 2,
            padding=((pad, pad),) * 2,
            dilation=(1, 1),
            bias=True,
            epilogue=("relu",),
            **common,
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "kind": type(self.shape).__name__}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cell:
        kinds: dict[str, Callable[..., Shape]] = {"ConvShape": ConvShape, "LinearShape": LinearShape}
        fields = {key: value for key, value in data.items() if key != "kind"}
        return cls(**{**fields, "shape": kinds[data["kind"]](**data["shape"])})


@dataclass(frozen=True)
class Candidate:
    """One way to run a cell: a kernel variant on tiles of one shape, with its parameters."""

    cell: Cell
    variant: str
    tile: tuple[int, int]
    config: Parameters = field(hash=False)

    @property
    def label(self) -> str:
        parameters = ",".join(f"{key}={value}" for key, value in sorted(self.config.items()))
        return f"{self.variant} {'x'.join(map(str, self.tile))} {parameters}"

    @property
    def pattern(self) -> BlockPattern:
        return _packed(self.cell, self.variant, self.tile)[0]

    def build(self, device: str) -> tuple[Callable[..., Tensor], PackedWeight]:
        """The layer as a function of `x, values, row_ptr, tile_index, bias`, and its packed weight."""
        pattern, packed = _packed(self.cell, self.variant, self.tile)
        kernel = KernelConfig(self.variant, self.config).encode(pattern)
        return sparse_layer(self.cell, kernel), PackedWeight(*(tensor.to(device) for tensor in packed))

    def to_json(self) -> dict[str, Any]:
        return {
            "cell": self.cell.to_json(),
            "variant": self.variant,
            "tile": list(self.tile),
            "config": dict(self.config),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Candidate:
        bh, bw = data["tile"]
        return cls(Cell.from_json(data["cell"]), data["variant"], (bh, bw), data["config"])


@functools.lru_cache(maxsize=4)
def _weight(cell: Cell) -> Tensor:
    shape = cell.shape.weight_shape
    where = "cuda" if torch.cuda.is_available() else "cpu"
    seed = zlib.crc32(str(cell).encode())
    weight = torch.randn(shape, generator=torch.Generator(where).manual_seed(seed), device=where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        choose = balanced_mask if cell.mask == "balanced" else random_mask
        mask = choose(torch.empty(shape, device="meta"), cell.block_shape, cell.density)
    return (weight * mask.to(where) / math.sqrt(math.prod(shape[1:]))).to(cell.torch_dtype)


@functools.lru_cache(maxsize=8)
def _packed(cell: Cell, variant: str, tile: tuple[int, int]) -> tuple[BlockPattern, PackedWeight]:
    weight = cell.weight()
    pattern = BlockPattern.from_weight(weight, tile)
    return pattern, VARIANTS[variant].pack(weight.cpu(), pattern)


def sparse_layer(cell: Cell, kernel: str) -> Callable[..., Tensor]:
    """Convolutions add a bias and end in a ReLU, as in a network; linear layers are the bare product."""
    if isinstance(cell.shape, LinearShape):
        features = cell.shape.out_features

        def linear(x: Tensor, values: Tensor, row_ptr: Tensor, tile_index: Tensor, bias: Tensor) -> Tensor:
            out: Tensor = torch.ops.blocksparse.linear(x, values, row_ptr, tile_index, None, features, kernel)
            return out

        return linear
    shape, pad = cell.shape, cell.shape.kernel // 2
    geometry = ([shape.kernel] * 2, [shape.stride] * 2, [pad] * 4, [1, 1])

    def conv(x: Tensor, values: Tensor, row_ptr: Tensor, tile_index: Tensor, bias: Tensor) -> Tensor:
        weight = (values, row_ptr, tile_index, bias, shape.out_channels)
        return torch.relu(torch.ops.blocksparse.conv(x, *weight, *geometry, True, kernel))

    return conv


def dense_layer(cell: Cell) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same layer as a function of `x, weight, bias`, in plain torch."""
    if isinstance(cell.shape, LinearShape):
        return lambda x, weight, bias: torch.nn.functional.linear(x, weight)
    stride, pad = cell.shape.stride, cell.shape.kernel // 2
    return lambda x, weight, bias: torch.relu(torch.conv2d(x, weight, bias, stride, pad))


def bias(cell: Cell, device: str) -> Tensor:
    return torch.linspace(-1, 1, cell.site().out_channels).to(device, cell.torch_dtype)


def candidates(cell: Cell, spec: Any, most: int) -> tuple[list[Candidate], list[str]]:
    """Every variant in at most `most` configs, on the mask's own blocks; and why others do not run."""
    site, weight = cell.site(), cell.weight()
    pattern = BlockPattern.from_weight(weight, cell.block_shape)
    found, refusals = [], []
    for name, variant in VARIANTS.items():
        if variant.device != "cuda":
            continue
        refusal = variant.unsupported(site, pattern)
        configs = [] if refusal else variant.configs(site, pattern, spec)[:most]
        found += [Candidate(cell, name, cell.block_shape, dict(config)) for config in configs]
        if not configs:
            refusals.append(f"{name}: {refusal or f'does not run on {spec.name}'}")
    return found, refusals


def by_importance(blocks: list[str], densities: list[float], batches: list[int]) -> Iterator[list[Cell]]:
    """Chunks of cells that are checked together, then timed; the first answer the main questions."""
    main = [d for d in densities if d in (0.5, 0.25)] or densities[:1]
    rest = [d for d in densities if d not in main]
    first, *others = blocks

    def cells(shapes: Any, sizes: Any, names: list[str], kept: list[float]) -> list[Cell]:
        return [Cell(*parts) for parts in itertools.product(shapes, sizes, names, kept)]

    yield cells(SPATIAL, batches[:1], [first], main)
    yield cells(LLAMA, (PREFILL_ROWS, 1), [first], main)
    yield cells(SPATIAL, batches[1:], [first], main)
    yield cells(POINTWISE, batches[:1], [first], main)
    yield cells(VIT, (64,), [first], main)
    for block in others:
        yield cells(SPATIAL, batches[:1], [block], main)
    yield cells(LLAMA, DECODE_ROWS[1:], [first], main)
    yield cells(SPATIAL, batches[:1], [first], rest)
    yield cells(POINTWISE, batches[1:], [first], main)
    for block in others:
        yield cells(LLAMA, (PREFILL_ROWS, 1), [block], main)
    yield cells(LLAMA, (PREFILL_ROWS, 1), [first], rest)
    for block in others:
        yield cells(SPATIAL, batches[1:], [block], main)
        yield cells(POINTWISE, batches[:1], [block], main)
    yield cells(POINTWISE, batches[:1], [first], rest)
    for block in others:
        yield cells(SPATIAL, batches[:1], [block], rest)
