"""Reads Inductor's Python wrapper: the Triton kernels in it, what they come from, how they are called."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

_NODES = re.compile(r"^#\s+%(\w+) .*?= call_function\[", re.MULTILINE)


@dataclass(frozen=True)
class KernelText:
    """A Triton kernel in a wrapper.

    Args:
        name: its function, and its variable in the wrapper.
        text: source of the module that Inductor would compile it from.
        nodes: names of the FX nodes that it comes from.
        calls: for each launch, the source of its arguments (buffers, sizes, grid).
    """

    name: str
    text: str
    nodes: tuple[str, ...]
    calls: tuple[tuple[str, ...], ...]


def read_kernels(wrapper: str) -> tuple[KernelText, ...]:
    """The kernels of a wrapper in order of definition."""
    tree = ast.parse(wrapper)
    lines = wrapper.splitlines()
    calls = _launches(tree)
    found = []
    for statement in tree.body:
        text = kernel_definition(statement)
        if text is not None:
            name = statement.targets[0].id  # type: ignore[attr-defined]
            nodes = tuple(_NODES.findall(_comment_above(lines, statement.lineno - 1)))
            found.append(KernelText(name, text, nodes, tuple(calls.get(name, ()))))
    return tuple(found)


def extern_calls(wrapper: str) -> tuple[str, ...]:
    """What the wrapper runs besides Triton kernels: `convolution`, `addmm`, `aten.sort.default` …"""
    pattern = r"^\s+(?:\w+ = )?(?:extern_kernels\.(\w+)|torch\.ops\.([\w.]+))\("
    return tuple(a or b for a, b in re.findall(pattern, wrapper, re.MULTILINE))


def kernel_definition(statement: ast.stmt) -> str | None:
    """The source text in `name = async_compile.triton('name', 'source', …)`; None for other statements."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
        return None
    call = statement.value
    if ast.unparse(call.func) != "async_compile.triton":
        return None
    source = call.args[1]
    assert isinstance(source, ast.Constant) and isinstance(source.value, str)
    return source.value


def _launches(tree: ast.Module) -> dict[str, list[tuple[str, ...]]]:
    found: dict[str, list[tuple[str, ...]]] = {}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: node.lineno):
        function = call.func
        if isinstance(function, ast.Attribute) and function.attr == "run":
            name = ast.unparse(function.value)
            found.setdefault(name, []).append(tuple(ast.unparse(argument) for argument in call.args))
    return found


def _comment_above(lines: list[str], index: int) -> str:
    start = index
    while start > 0 and lines[start - 1].startswith("#"):
        start -= 1
    return "\n".join(lines[start:index])
