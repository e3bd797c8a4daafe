"""What the package decides about layers on a GPU, as far as that shows without one."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from layer_cases import even_pattern, linear_site
from torch import nn
from torch._subclasses import FakeTensorMode

import blocksparse_compiler as bsc
from blocksparse_compiler import devices, gpu_timing, tune
from blocksparse_compiler.backend import _freeze_inputs
from blocksparse_compiler.passes.choose_kernels import choose_kernels
from blocksparse_compiler.passes.pipeline import PassContext, run_pipeline

H200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
T4 = SimpleNamespace(name="Tesla T4", major=7, minor=5, multi_processor_count=40)


def graph_on(device: str, dtype: torch.dtype = torch.bfloat16):
    """A block-sparse layer whose recorded tensors are on `device`; the weight itself stays here."""
    torch.manual_seed(0)
    layer = nn.Conv2d(256, 256, 3, padding=1).to(dtype)
    pattern = bsc.BlockPattern.full(tuple(layer.weight.shape), (64, 64))
    layer.weight.data = pattern.with_kept(torch.rand(pattern.grid_shape) < 0.25).apply(layer.weight.data)
    gm = bsc.trace(layer, torch.randn(64, 256, 14, 14, dtype=dtype))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            with mode:
                node.meta["val"] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=device
                )
    return gm


@pytest.fixture
def gpu(monkeypatch):
    def present(properties):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)

    return present


def test_a_layer_on_a_present_gpu_gets_a_gpu_kernel(gpu):
    gpu(H200)
    (decision,) = choose_kernels(graph_on("cuda:0"))
    assert decision.kernel.startswith("triton_"), decision.reason
    assert decision.site.device == "cuda:0"


def test_an_old_gpu_stays_dense_and_says_why(gpu):
    gpu(T4)
    (decision,) = choose_kernels(graph_on("cuda:0"))
    assert decision.is_dense
    assert "compute capability 8.0" in decision.reason


def test_without_triton_gpu_layers_stay_dense_and_say_what_to_install(gpu, monkeypatch):
    gpu(H200)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "triton" else real(name)
    )
    (decision,) = choose_kernels(graph_on("cuda:0"))
    assert decision.is_dense
    assert "pip install triton" in decision.reason
    # Layers on the CPU, and plans for a GPU elsewhere, do not need it.
    (on_cpu,) = choose_kernels(graph_on("cpu", torch.float32))
    assert on_cpu.kernel.startswith("cpu_")
    (elsewhere,) = bsc.plan(graph_on("cpu"), "h200")
    assert elsewhere.kernel.startswith("triton_")


def test_16_bit_layers_on_a_cpu_get_kernels_of_a_cpu():
    (decision,) = choose_kernels(graph_on("cpu"))
    assert decision.kernel == "cpu_bf16"


def test_explain_plans_for_the_gpu_that_the_model_is_on(gpu, monkeypatch):
    gpu(H200)
    model, x = nn.Linear(8, 8), torch.randn(2, 8)
    assert devices.home(model, (x,)) is None
    with FakeTensorMode():
        assert devices.home(nn.Identity(), ([torch.empty(2, device="cuda:1")],)) == "cuda:1"
    module = importlib.import_module("blocksparse_compiler.explain")
    monkeypatch.setattr(module, "home", lambda model, inputs: "cuda:0")
    assert bsc.explain(model, x).device.name == "h200"
    assert bsc.explain(model, x, device="a100").device.name == "a100"


def test_tuned_graphs_have_the_dtype_of_the_layer():
    site = linear_site(8, 12, (2, 5))
    gm, x = tune.layer_graph(site, torch.randn(8, 12, dtype=torch.bfloat16))
    assert x.dtype == gm.bias.dtype == gm(x)[0].dtype == torch.bfloat16


def test_times_on_a_gpu_are_taken_by_events_and_kept_per_gpu(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKSPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "compile_candidate", lambda *a: (print, None))
    monkeypatch.setattr(tune, "call_cost", lambda device: None)
    measured = []

    def interleave(calls, seconds, device):
        measured.append(device)
        seconds = {"empty": 1e-6, "dense": 1e-3}
        return {name: gpu_timing.Timing(seconds.get(name, 5e-4), 0) for name in calls}

    monkeypatch.setattr(gpu_timing, "interleave", interleave)
    site = replace(linear_site(256, 256, (512,)), dtype="bfloat16", device="cuda:0")
    pattern = even_pattern(site, 0.25, (64, 64))
    for name in ("NVIDIA H200", "NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None, name=name: name)
        decision = tune.measure(site, [pattern], devices.device("h200"))
        assert decision.measured
        assert not decision.is_dense
    assert measured == ["cuda:0"] * 2  # the second H200 read the first one's file


def test_no_input_is_static_to_cuda_graphs(monkeypatch):
    """Weights are constants of the compiled graph: if Inductor still counted them among its inputs, CUDA
    graphs would take an activation for a weight, and replay on the first one for ever."""
    seen = []
    import torch._inductor.compile_fx as module

    inner, outer = module.compile_fx_inner, module.compile_fx

    def spy(*args, **kwargs):
        seen.append(list(kwargs["static_input_idxs"]))
        return inner(*args, **kwargs)

    monkeypatch.setattr(module, "compile_fx", lambda *args, **kw: outer(*args, **{"inner_compile": spy} | kw))
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        torch.compile(model, backend="blocksparse")(torch.randn(4, 64))
    assert seen == [[]]


@torch.no_grad()
def test_autocast_decides_the_dtype_of_a_layer():
    """Autocast is no part of the graph, and does not know our operators: they get operands in its dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 1, bias=False), nn.Flatten(2))
    model = bsc.prune_blocks(nn.Sequential(*model, nn.Linear(16, 64)), (16, 16), 0.5).eval()
    x, graphs = torch.randn(2, 64, 6, 6), []

    def keep(gm, inputs):
        graphs.append((gm, inputs))
        return gm.forward

    with torch.autocast("cpu", torch.bfloat16):
        torch._dynamo.reset()
        expected = torch.compile(model, backend=keep)(x)
        gm, inputs = graphs[0]
        frozen = _freeze_inputs(gm, {i: t for i, t in enumerate(inputs) if isinstance(t, nn.Parameter)})
        plan = run_pipeline(frozen, PassContext(device=devices.device("h200"), allow_dense=False))
        assert {(d.site.dtype, d.is_dense) for d in plan} == {("bfloat16", False)}
    (got,) = frozen(x)
    assert {frozen.get_buffer(n.args[1].target).dtype for n in _sparse_calls(frozen)} == {torch.bfloat16}
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def _sparse_calls(gm):
    return [node for node in gm.graph.nodes if str(node.target).startswith("blocksparse.")]
