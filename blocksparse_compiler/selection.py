"""Finds the layers that a function of this package should work on, by name or by type."""

from __future__ import annotations

import difflib
import logging
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx, nn

from .errors import BlockSparseError, LayerError
from .layout import DENSE_TYPES

log = logging.getLogger(__name__)

Filter = str | type | Iterable[str | type] | None


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a model.

    Args:
        name: its qualified name (the first one, if the module is used under several).
        explicit: whether the user asked for it by its whole name, so that skipping it would be wrong.
    """

    name: str
    module: nn.Module
    explicit: bool = False


def select_layers(
    model: nn.Module, function: str, include: Filter = None, exclude: Filter = None, only_called: bool = False
) -> list[Layer]:
    """The model's convolution and linear layers that pass both filters, in the order of `named_modules`.

    A filter is a name, a module type, or several of them. A name may have wildcards (`"layer?.*.conv2"`),
    and stands for everything below it as well (`"layer1"`).

    Args:
        only_called: leave out layers that `forward` does not use, as far as torch.fx can tell.

    Raises:
        LayerError: if a name matches no layer, or `model` is no module.
    """
    if not isinstance(model, nn.Module):
        fix = "Pass the model itself."
        raise LayerError(function, "a torch.nn.Module", type(model).__name__, fix)
    layers = list(_walk(model))
    include, exclude = _as_tuple(include), _as_tuple(exclude)
    for name in (f for f in include + exclude if isinstance(f, str)):
        if not any(_matches(layer, (name,)) for layer in layers):
            raise _no_such_layer(function, name, layers)
    called = _called_layers(model) if only_called else None
    selected = []
    for layer in layers:
        if (include and not _matches(layer, include)) or _matches(layer, exclude):
            continue
        layer = Layer(layer.name, layer.module, explicit=layer.name in include)
        if called is not None and layer.module not in called and not layer.explicit:
            log.info("%s leaves %s as it is: forward does not call it", function, layer.name)
            continue
        selected.append(layer)
    return selected


def keep_valid(
    layers: list[Layer], function: str, *checks: Callable[[Layer], object]
) -> tuple[list[Layer], BlockSparseError | None]:
    """The layers that pass all checks, and the error of the largest one that did not.

    The reason for leaving a layer out is logged; for a layer the user named, it is raised.
    """
    valid, worst, most = [], None, -1
    for layer in layers:
        try:
            for check in checks:
                check(layer)
        except BlockSparseError as error:
            if layer.explicit:
                raise
            log.info("%s leaves %s as it is: %s", function, layer.name, error)
            size = sum(p.numel() for p in layer.module.parameters() if not nn.parameter.is_lazy(p))
            if size > most:
                worst, most = error, size
        else:
            valid.append(layer)
    return valid, worst


def nothing_left(function: str, error: BlockSparseError | None) -> BlockSparseError:
    """The error for a call that would change no layer at all."""
    if error is None:
        fix = "Check include and exclude."
        return LayerError(function, "at least one convolution or linear layer", "none", fix)
    fix = f"{error.fix} No other layer of the model could be used either."
    return type(error)(error.where, error.expected, error.got, fix)


# ---- internals ------------------------------------------------------------------------------------


def _walk(model: nn.Module) -> Iterator[Layer]:
    for name, module in model.named_modules():
        if isinstance(module, DENSE_TYPES):
            yield Layer(name or type(module).__name__, module)


class _LayerTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DENSE_TYPES) or super().is_leaf_module(m, module_qualified_name)


def _called_layers(model: nn.Module) -> set[nn.Module] | None:
    """The modules that `forward` reaches; `None` (and a warning) if torch.fx cannot trace the model."""
    try:
        with _attributes_kept(model):
            graph = _LayerTracer().trace(model)
    except Exception as error:  # whatever the user's forward raises on proxies
        reason = textwrap.shorten(str(error).split(". ")[0], 100, placeholder="…")
        log.warning(
            "torch.fx cannot trace %s (%s): taking every convolution and linear layer in it, called or not",
            type(model).__name__,
            reason,
        )
        return None
    called: set[nn.Module] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            called.update(model.get_submodule(node.target).modules())
        elif node.op == "get_attr":
            # `F.conv2d(x, self.conv.weight)`: every module on the way to the tensor.
            path = node.target.split(".")[:-1]
            called.update(model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1))
    return called


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Undoes what `forward` sets on modules: while tracing, `self.features = x` would leave a proxy there."""
    before = {module: dict(module.__dict__) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _as_tuple(filter: Filter) -> tuple[str | type, ...]:
    if filter is None:
        return ()
    return (filter,) if isinstance(filter, str | type) else tuple(filter)


def _matches(layer: Layer, filters: tuple[str | type, ...]) -> bool:
    for f in filters:
        if isinstance(f, str):
            if fnmatchcase(layer.name, f) or fnmatchcase(layer.name, f + ".*"):
                return True
        elif isinstance(layer.module, f):
            return True
    return False


def _no_such_layer(function: str, name: str, layers: list[Layer]) -> LayerError:
    near = difflib.get_close_matches(name, [layer.name for layer in layers], n=3, cutoff=0.3)
    fix = f"Did you mean {', '.join(near)}?" if near else "Names are those of model.named_modules()."
    return LayerError(function, "include and exclude to name convolution or linear layers", repr(name), fix)
