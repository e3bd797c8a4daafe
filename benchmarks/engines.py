"""Dense layers and networks on other engines, where they are installed (`pip install .[bench]`): ONNX Runtime
and OpenVINO, in fp32, on as many threads as torch has."""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from .timing import Call

log = logging.getLogger(__name__)


class Several(nn.Module):
    """Layers on one input, each with a ReLU behind it if asked for."""

    def __init__(self, layers: Sequence[nn.Module], relu: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.relu = relu

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = [layer(x) for layer in self.layers]
        return [torch.relu(y) for y in outputs] if self.relu else outputs


def engine_calls(module: nn.Module, x: Tensor) -> dict[str, Call]:
    """Calls without arguments that return a list of arrays; empty where no engine is installed.

    An engine whose result differs from torch's is left out, with a warning: its time would mean nothing.
    """
    found = [name for name in _ENGINES if importlib.util.find_spec(name)]
    if not found or not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        return {}
    model, calls = _onnx_model(module, x), {}
    for name in found:
        call = _ENGINES[name](model, x)
        if agrees(call(), module(x)):
            calls[name] = call
        else:
            log.warning("%s does not compute what torch does: left out", name)
    return calls


def _onnx_model(module: nn.Module, x: Tensor) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # every export names the packages it does without
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    assert program is not None
    model: bytes = program.model_proto.SerializeToString()
    return model


def _onnxruntime(model: bytes, x: Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, feed)


def _openvino(model: bytes, x: Tensor) -> Call:
    import openvino

    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    array = x.contiguous().numpy()
    return lambda: list(request.infer([array], share_inputs=True, share_outputs=True).values())


_ENGINES = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def agrees(got: Sequence[Any], expected: Tensor | Sequence[Tensor]) -> bool:
    """Whether all arrays are the tensors, up to rounding."""
    expected = [expected] if isinstance(expected, Tensor) else expected
    pairs = zip(got, expected, strict=True)
    return all(float((torch.as_tensor(y) - e).norm() / e.norm()) < 1e-3 for y, e in pairs)
