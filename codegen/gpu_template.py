"""The block-sparse GPU kernels as Inductor Triton templates.

The files `templates/gpu_*.jinja` are rendered in two steps: here for the geometry of a layer, so that the
kernel reads as straight code for that layer, and by Inductor for sizes, arguments and the fused epilogue.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from .gpu_descriptor import Descriptor, describe
from .inductor_api import SymbolicGridFn, TritonTemplate

_TEMPLATES = Path(__file__).parent / "templates"
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a convolution; sizes and strides are expressions in the kernel's text."""

    name: str
    size: str
    out_size: str
    input_stride: str
    kernel: int
    stride: int
    padding: int
    dilation: int

    def shift(self, tap: int | str) -> int | str:
        """How far this tap of the axis lies from the pixel, as a number or an expression."""
        if isinstance(tap, int) or self.kernel == 1:
            return (tap * self.dilation if isinstance(tap, int) else 0) - self.padding
        scaled = tap if self.dilation == 1 else f"{tap} * {self.dilation}"
        return f"{scaled} - {self.padding}" if self.padding else scaled


WEIGHT_GRAD = "triton_weight_grad"
"""The kernel for gradients of tiles: no row of the kernel table, but made as those are."""

MAX_MASK_BITS = 32
"""Taps for which one integer holds whether they fall inside the image."""


@dataclass(frozen=True)
class KernelText:
    """Everything that the text of a kernel depends on, besides the numbers passed as constants.

    Args:
        variant: the kernel's row, and the name of its template file without `triton_`.
        axes: spatial dimensions; none for a linear layer.
        flat: pixels lie evenly spaced in memory and match one to one: no index arithmetic.
        masked: some tap of some pixel falls outside the image.
        bias: whether the kernel adds one.
        precision: of fp32 products, `"tf32"` or `"ieee"`; empty for 16-bit types.
        split: programs that share a sum (their results are added up afterwards).
        swapped: weights, not activations, are the rows of the product.
        boxed: activations are copied by a tensor descriptor, in boxes of pixels.
        l1: activations are cached in L1, for the taps that read them next.
    """

    variant: str
    axes: tuple[Axis, ...] = ()
    flat: bool = False
    masked: bool = False
    bias: bool = False
    precision: str = ""
    split: int = 1
    boxed: bool = False
    l1: bool = False
    swapped: bool = False

    @property
    def num_taps(self) -> int:
        return math.prod(axis.kernel for axis in self.axes)

    def render(self) -> str:
        """The source of a Triton template."""
        taps = list(itertools.product(*([(axis, k) for k in range(axis.kernel)] for axis in self.axes)))
        name = self.variant.removeprefix("triton_")
        return _ENVIRONMENT.get_template(f"gpu_{name}.jinja").render(
            axes=self.axes,
            flat=self.flat,
            masked=("bits" if len(taps) <= MAX_MASK_BITS else "places") if self.masked else "",
            swapped=self.swapped,
            bias=self.bias,
            split=self.split,
            taps=len(taps) > 1,
            tap_axes=taps,
            tap_offset=self._tap_offset(),
            cache=', cache_modifier=".ca"' if self.l1 else "",
            boxes=self._boxes() if self.boxed else None,
            digits=dict(zip((axis.name for axis in self.axes), self._tap_digits(), strict=True)),
            pixel_count=self._pixel_count(),
            pixel_stride=self._pixel_stride(),
            grad_stride=stride_of("GRAD", len(self.axes) + 1 if self.axes else 0),
            out_channels=size_of(None, len(self._indices) - 1),
            dot_options=f', input_precision="{self.precision}"' if self.precision else "",
            size=size_of,
            stride=stride_of,
            def_kernel=self._def_kernel,
            store_output=self._store_output,
        )

    def _tap_digits(self) -> list[str]:
        """Which tap along each axis `tap` is."""
        digits, inner = [], self.num_taps
        for axis in self.axes:
            inner //= axis.kernel
            digit = f"tap // {inner}" if inner > 1 else "tap"
            digits.append(digit if inner * axis.kernel == self.num_taps else f"{digit} % {axis.kernel}")
        return digits

    def _tap_offset(self) -> str:
        """Elements between a pixel's first input before padding and that of the tap, as further terms."""
        terms = ""
        for axis in self.axes:
            if axis.kernel > 1:
                terms += f" + shift_{axis.name} * {axis.input_stride}"
            elif axis.padding:
                terms += f" - {axis.padding} * {axis.input_stride}"
        return terms

    def _boxes(self) -> Descriptor:
        if self.flat:
            shape = (self._pixel_count(), size_of("X", 1))
            return Descriptor("X", shape, (self._pixel_stride(), "1"), ("PIXELS", "BW"), ("n0", "first"))
        images = size_of("X", 0), stride_of("X", 0)
        return describe(self.axes, self._tap_digits(), images, size_of("X", 1))

    def _pixel_stride(self) -> str:
        return stride_of("X", len(self.axes) + 1 if self.axes else 0)

    def _pixel_count(self) -> str:
        return " * ".join([size_of("X", 0), *(axis.out_size for axis in self.axes)])

    def _def_kernel(self, *names: str) -> str:
        wanted = [name for name in names if name != "BIAS" or self.bias]
        arguments = ", ".join(f'"{name}"' for name in wanted)
        return _hook(f"def_kernel({arguments})")

    def _store_output(self, value: str, mask: str, shape: tuple[str, str]) -> str:
        return _hook(f'store_output({self._indices!r}, "{value}", "{mask}", val_shape={shape!r})')

    @property
    def _indices(self) -> tuple[str, ...]:
        """The output's indices, outermost first."""
        part = ("idx_part",) if self.split > 1 else ()
        if self.variant == WEIGHT_GRAD:
            return (*part, "idx_tile", "idx_row", "idx_column")
        pixel = ("idx_n", *(f"idx_{axis.name}" for axis in self.axes)) if self.axes else ("idx_row",)
        return (*part, *pixel, "idx_c")


def _hook(call: str) -> str:
    """Text that Inductor replaces when it renders the template."""
    return "{{" + call + "}}"


def size_of(name: str | None, dim: int) -> str:
    return _number(f"size({name!r}, {dim})")


def stride_of(name: str, dim: int) -> str:
    return _number(f"stride({name!r}, {dim})")


def _number(call: str) -> str:
    """A hook that gives a number or a symbolic expression; the latter in parentheses."""
    return _hook(f'("(%s)" if " " in {call} else "%s") | format({call})')


@SymbolicGridFn
def _grid(*sizes: Any, cdiv: Any) -> Any:
    *pixels, _channels, meta = sizes
    if "SPLIT" in meta:
        return (meta["ROWS"] * meta["SPLIT"], 1, 1)
    boxed = "BOX_N" in meta
    count = 1
    for size, axis in zip(pixels, ("N", *"DHW"[4 - len(pixels) :]), strict=True):
        count = count * (cdiv(size, meta[f"BOX_{axis}"]) if boxed else size)
    return ((count if boxed else cdiv(count, meta["PIXELS"])) * meta["ROWS"], 1, 1)


def template(text: KernelText) -> TritonTemplate:
    """The Inductor template for this text."""
    return _template(text.variant, text.render())


@functools.cache
def _template(variant: str, source: str) -> TritonTemplate:
    """One template per source, since Inductor wants unique names."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return TritonTemplate(name=f"blocksparse_{variant}_{digest}", grid=_grid, source=source)
