"""The backend's promises on a real GPU."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from on_gpu import GPU
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler import device_samples
from blocksparse_compiler.backend import compiled_graphs

pytest.importorskip("triton")
pytestmark = GPU

BLOCK = (64, 64)


class Net(nn.Module):
    """Convolution, batch norm, residual, ReLU, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(128, 128, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(128)
        self.second = nn.Conv2d(128, 128, 1)
        self.head = nn.Linear(128, 256)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)) + x)
        return self.head(torch.relu(self.second(y)).mean((2, 3)))


def network(dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_var.uniform_(0.5, 2)
    bsc.prune_blocks(model, (32, 32), 0.5)
    return model.to("cuda", dtype).to(memory_format=torch.channels_last)


def image(n=4, dtype=torch.bfloat16):
    return torch.randn(n, 128, 14, 14, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)


def compiled(model, **how):
    torch._dynamo.reset()
    how.setdefault("options", {"dense": "never"})
    if how.get("mode"):
        del how["options"]
    return torch.compile(model, backend="blocksparse", fullgraph=True, **how)


def plan():
    return compiled_graphs()[-1].plan


def assert_right(got, model, x, factor=2.0):
    """Error against float64 at most `factor` times that of eager, plus a rounding."""
    exact = copy.deepcopy(model).double()(x.double())
    error, eager = ((y.double() - exact).norm() / exact.norm() for y in (got, model(x)))
    assert error <= factor * eager + torch.finfo(got.dtype).eps / 2, f"{error:.1e}, eager {eager:.1e}"


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_layer_runs_on_a_gpu_kernel(dtype):
    model, x = network(dtype), image(dtype=dtype)
    got = compiled(model)(x)
    assert [d.kernel.startswith("triton_") for d in plan()] == [True] * 3, plan()
    assert got.shape == (4, 256)
    assert_right(got, model, x)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(mode):
    model = network()
    fast = compiled(model, mode=mode)
    for n in (4, 4, 4, 7, 4):  # CUDA graphs are recorded and replayed, with inputs that move
        x = image(n)
        torch.compiler.cudagraph_mark_step_begin()
        assert_right(fast(x).clone(), model, x)


def test_dynamic_batch_is_not_one_graph_per_size():
    model = network()
    fast = compiled(model)
    graphs = set()
    for n in (2, 3, 17, 64):
        x = image(n)
        torch._dynamo.mark_dynamic(x, 0)
        assert_right(fast(x), model, x)
        graphs.add(compiled_graphs()[-1].serial)
    assert len(graphs) <= 2  # Dynamo itself tells some sizes of convolutions apart


def test_inference_mode_and_contiguous_inputs():
    model = network()
    fast = compiled(model)
    with torch.inference_mode():
        x = image().contiguous()
        assert_right(fast(x), model, x)


def test_autocast():
    model, x = network(torch.float32), image(dtype=torch.float32)
    fast = compiled(model)
    with torch.autocast("cuda", torch.bfloat16):
        got, eager = fast(x), model(x)
    assert got.dtype == eager.dtype
    torch.testing.assert_close(got, eager, rtol=0.03, atol=0.03)


def _in_place(model):
    model.first.weight.mul_(2)


def _state_dict(model):
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


def _replaced(model):
    model.second.weight = nn.Parameter(model.second.weight * 2)


@pytest.mark.parametrize("change", [_in_place, _state_dict, _replaced])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_changed_weight_is_noticed_at_once(change, mode):
    model, x = network(), image()
    fast = compiled(model, mode=mode)
    for _ in range(3):
        fast(x)
    change(model)
    assert_right(fast(x).clone(), model, x)


def test_a_write_through_data_is_noticed_soon():
    model, x = network(), image()
    fast = compiled(model)
    fast(x)
    model.first.weight.data.mul_(3)
    for _ in range(3):
        time.sleep(2 * device_samples.PERIOD)
        fast(x)
        torch.cuda.synchronize()
    assert_right(fast(x), model, x)


def test_calls_do_not_wait_for_the_gpu():
    """Work queued before a call must not delay its return."""
    model, x = network(), image()
    fast = compiled(model)
    for _ in range(3):
        fast(x)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(int(2e9))  # about a second
    for _ in range(5):
        time.sleep(1.1 * device_samples.PERIOD)
        fast(x)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_capture_in_a_graph_of_the_user():
    model, x = network(), image()
    fast = compiled(model)
    for _ in range(3):
        fast(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(x)
    x.copy_(image())
    graph.replay()
    assert_right(out, model, x)


def test_autotune(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE_DIR", str(tmp_path))
    model, x = network(), image(64)
    fast = compiled(model, options={"autotune": True})
    assert_right(fast(x), model, x)
    assert all(d.measured for d in plan()), [d.reason for d in plan()]
    assert list(tmp_path.glob("tuning-*.json"))


def test_unsupported_dtype_stays_dense():
    model, x = network(torch.float64), image(dtype=torch.float64)
    got = compiled(model)(x)
    assert all(d.is_dense for d in plan())
    torch.testing.assert_close(got, model(x))


def test_operands_on_two_devices_fail_as_in_eager():
    model = network()
    with pytest.raises(RuntimeError):
        model(image().cpu())
    with pytest.raises(RuntimeError, match="device"):
        compiled(model)(image().cpu())


def test_the_cpu_still_works():
    model = network(torch.float32).cpu()
    x = image(dtype=torch.float32).cpu()
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-4, atol=1e-4)
    assert all(d.kernel.startswith("cpu_") for d in plan())


def test_a_package_for_the_gpu(tmp_path):
    model, x = network(), image()
    bsc.export(model, (x,), tmp_path / "net.pt2", options={"dense": "never"})
    run = torch._inductor.aoti_load_package(str(tmp_path / "net.pt2"))
    assert_right(run(x), model, x)


def test_dense_weights_free_their_memory():
    """The compiled graph holds kept tiles only; the model's own parameters are all that is dense."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(4)))
    bsc.prune_blocks(model, BLOCK, 0.125)
    model = model.eval().to("cuda", torch.bfloat16)
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    weights = sum(p.nbytes for p in model.parameters())
    before = torch.cuda.memory_allocated()
    fast = compiled(model)
    fast(x)
    torch.cuda.synchronize()
    assert not any(d.is_dense for d in plan())
    assert torch.cuda.memory_allocated() - before < 0.3 * weights


def test_explain_shows_triton_kernels():
    model, x = network(), image()
    found = bsc.explain(model, x)
    sparse = [d.site.name for d in found.plan if not d.is_dense]
    assert set(found.kernels) == set(sparse)
    assert all("tl.dot" in text for text in found.kernels.values())


@pytest.fixture(scope="module")
def resnet():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=100)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    names = [
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and min(m.weight.shape[:2]) >= 64
    ]
    with torch.no_grad():
        bsc.prune_blocks(model, BLOCK, 0.5, include=names)
    return model.to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_resnet50(resnet, mode):
    forward = compiled(lambda x: resnet(x).logits, mode=mode)
    for batch in (8, 8, 3):
        x = torch.randn(batch, 3, 96, 96, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        torch.compiler.cudagraph_mark_step_begin()
        got = forward(x).clone()
        exact = copy.deepcopy(resnet).double()(x.double()).logits
        error, eager = ((y.double() - exact).norm() / exact.norm() for y in (got, resnet(x).logits))
        assert error <= 2 * eager + 1e-3
    if mode is None:
        assert sum(not d.is_dense for d in plan()) > 40


@pytest.mark.parametrize("autocast", [False, True])
def test_training_on_kept_tiles(autocast):
    torch.manual_seed(0)
    model = Net().cuda().to(memory_format=torch.channels_last)
    bsc.apply_pattern(model, bsc.RandomBlocks((32, 32), 0.5))
    fast, x, gradients = compiled(model), image(8, torch.float32), []
    for run in (model, fast):
        model.zero_grad()
        with torch.enable_grad():
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                out = run(x)
            out.float().square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, want in gradients[0].items():
        assert (gradients[1][name] - want).norm() <= (5e-2 if autocast else 1e-3) * want.norm(), name
    assert sum(d.kernel == "triton_gather" for d in plan()) == 3
