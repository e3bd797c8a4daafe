"""The five promises, on networks small enough to compile in seconds."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.backend import MAX_RECOMPILES, compiled_graphs
from blocksparse_compiler.plan import Plan


class Net(nn.Module):
    """Every kind of epilogue on one 64-channel shape, so that tests share compiled kernels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 64)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)) + x)
        return self.head(y.mean((2, 3)))


def network(seed=0):
    torch.manual_seed(seed)
    model = Net()
    for layer in (model.conv, model.head):
        pattern = BlockPattern.full(layer.weight.shape, (32, 32))
        keep = torch.tensor([[1, 0], [0, 1]]).bool()[:, None].expand(pattern.grid_shape)
        layer.weight.data = pattern.with_kept(keep).apply(layer.weight.data)
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def image(n=2):
    return torch.randn(n, 64, 14, 14)


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="blocksparse", fullgraph=True, options={"dense": "never", **options})


def check(fast, model, x):
    got, expected = fast(x), model(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def kernels():
    return [d.kernel for d in compiled_graphs()[-1].plan]


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_modes(mode, guard):
    model, x = network(), image()
    torch._dynamo.reset()
    fast = torch.compile(model, backend="blocksparse", mode=mode, fullgraph=True)
    with guard():
        check(fast, model, x)
        check(fast, model, image(5))


@torch.no_grad()
def test_error_against_float64_is_that_of_dense():
    model, x = network(), image(8)
    fast = compiled(model)
    got, dense = fast(x), model(x)
    exact = network().double()(x.double())
    assert (got - exact).abs().max() <= 1.5 * (dense - exact).abs().max() + 1e-7
    assert all(kernel != "dense" for kernel in kernels())


def _step(model):
    model.conv.weight.mul_(2)


def _load(model):
    state = network(1).state_dict()
    model.load_state_dict(state)


def _replace(model):
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 3)


def _data(model):
    model.conv.weight.data.mul_(0.5)


def _new_block(model):
    model.conv.weight[:32, 32:] = 0.1


def _statistics(model):
    model.norm.running_mean.add_(1)


def _optimizer(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("change", [_step, _load, _replace, _data, _new_block, _statistics, _optimizer])
@torch.no_grad()
def test_changed_weights_are_never_stale(change):
    model, x = network(), image()
    fast = compiled(model)
    check(fast, model, x)
    before = fast(x).clone()
    change(model)
    check(fast, model, x)
    assert not torch.allclose(fast(x), before)
    check(fast, model, image(3))


def test_changed_weights_under_inference_mode():
    model, x = network(), image()
    fast = compiled(model)
    with torch.inference_mode():
        check(fast, model, x)
    with torch.no_grad():
        model.conv.weight.mul_(2)
    with torch.inference_mode():
        check(fast, model, x)


@torch.no_grad()
def test_batch_statistics_update_in_training_mode_without_gradients():
    model, other, x = network().train(), network().train(), image()
    fast = compiled(model)
    for _ in range(3):
        torch.testing.assert_close(fast(x), other(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.norm.running_mean, other.norm.running_mean)
    assert int(model.norm.num_batches_tracked) == 3


def relative_error(got, model, x):
    exact = copy.deepcopy(model).double()(x.double())
    return float((got - exact).norm() / exact.norm())


@torch.no_grad()
@pytest.mark.parametrize("dtype, kernel", [(torch.bfloat16, "cpu_bf16"), (torch.float16, "cpu_f16")])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_by_conversion_and_by_autocast(autocast, dtype, kernel):
    """Autocast casts weights inside the graph: they are constants there, and become tiles like others."""
    full, x = network(), image()
    model, x_low = (full, x) if autocast else (copy.deepcopy(full).to(dtype), x.to(dtype))
    with torch.autocast("cpu", dtype, enabled=autocast):
        got, dense = compiled(model)(x_low), model(x_low)
    assert (got.dtype, got.shape, got.stride()) == (dense.dtype, dense.shape, dense.stride())
    assert kernels() == [kernel, kernel]
    assert relative_error(got, full, x) <= 1.5 * relative_error(dense, full, x)


@torch.no_grad()
def test_mixed_dtypes_raise_what_eager_raises():
    model, x = network().bfloat16(), image()
    for call in (model, compiled(model)):
        with pytest.raises(Exception, match=r"Input type .* should be the same"):
            call(x)


@torch.no_grad()
def test_weights_that_keep_changing_end_on_kernels_that_read_them(caplog):
    model, x = network(), image()
    fast = compiled(model, fx_graph_cache=True)
    with caplog.at_level(logging.WARNING, "blocksparse_compiler"):
        for _ in range(MAX_RECOMPILES + 2):
            check(fast, model, x)
            model.head.bias.add_(1)
        check(fast, model, x)
    assert "weights changed" in caplog.text


def test_training_passes_gradients_and_says_that_it_is_dense(caplog):
    model, x = network().train(), image()
    fast = compiled(model)
    with caplog.at_level(logging.WARNING, "blocksparse_compiler"):
        fast(x).square().mean().backward()
    assert "no_grad" in caplog.text
    got = model.conv.weight.grad.clone()
    model.zero_grad()
    network().train()  # fresh statistics do not matter in training mode
    model(x).square().mean().backward()
    torch.testing.assert_close(got, model.conv.weight.grad, rtol=1e-3, atol=1e-5)


def test_train_then_evaluate_then_train():
    model, x = network(), image()
    fast = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()
        fast(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            check(fast, model, x)


@torch.no_grad()
def test_a_buffer_that_the_graph_writes_is_not_frozen():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.add_(1)
            return self.net(x) + self.calls

    model, x = Counter().eval(), image()
    expected = [model(x) for _ in range(3)]
    model.calls.zero_()
    fast = compiled(model)
    for want in expected:
        torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_inputs_of_any_layout_and_empty_batches():
    model = network()
    fast = compiled(model)
    x = image(4)
    for y in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x[::2]):
        check(fast, model, y)
    assert fast(image(0)).shape == model(image(0)).shape


@torch.no_grad()
def test_an_unsupported_dtype_stays_dense_and_says_so():
    dtype = torch.float64
    model, x = network().to(dtype), image().to(dtype)
    fast = compiled(model)
    torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    plan = compiled_graphs()[-1].plan
    assert all(d.is_dense and str(dtype).removeprefix("torch.") in d.reason for d in plan)


@torch.no_grad()
def test_nan_weights_name_the_layer():
    model = network()
    model.conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(Exception, match="conv: expected finite weights, got 1 NaN"):
        compiled(model)(image())


@torch.no_grad()
def test_shape_errors_are_those_of_eager():
    fast = compiled(network())
    with pytest.raises(Exception, match="channels"):
        fast(torch.randn(2, 3, 14, 14))


@torch.no_grad()
def test_plans_can_be_edited_and_passed_back(tmp_path):
    model, x = network(), image()
    check(compiled(model), model, x)
    plan = compiled_graphs()[-1].plan
    assert kernels() == ["cpu_f32", "cpu_f32"]
    plan.with_kernel("conv", "dense").save(tmp_path / "plan.json")
    check(compiled(model, plan=tmp_path / "plan.json"), model, x)
    assert kernels() == ["dense", "cpu_f32"]
    edited = Plan.load(tmp_path / "plan.json")
    assert edited["conv"].reason == "chosen by the user"
    model.head.weight[:] = 1
    with pytest.raises(Exception, match="head: expected zero weights outside"):
        compiled(model, plan=edited)(x)


@torch.no_grad()
def test_block_shape_option():
    model, x = network(), image()
    check(compiled(model, block_shape=(16, 16)), model, x)
    assert compiled_graphs()[-1].plan["conv"].pattern.block_shape == (16, 16)


@torch.no_grad()
def test_dump_dir_holds_graph_plan_and_sources(tmp_path):
    model, x = network(), image()
    check(compiled(model, dump_dir=tmp_path), model, x)
    (folder,) = tmp_path.iterdir()
    names = {p.name for p in folder.iterdir()}
    assert {"plan.json", "plan.txt", "generated_0.py"} <= names
    assert sum(name.endswith("lower_sites.py") for name in names) == 1
    assert Plan.load(folder / "plan.json") and "block_sparse" in (folder / "generated_0.py").read_text()


@torch.no_grad()
def test_graph_breaks_and_several_graphs():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = network(0), network(1)

        def forward(self, x):
            y = self.first(x)
            torch._dynamo.graph_break()
            return y + self.second(x)

    model, x = Broken().eval(), image()
    torch._dynamo.reset()
    fast = torch.compile(model, backend="blocksparse", options={"dense": "never"})
    check(fast, model, x)


@torch.no_grad()
def test_cpp_wrapper_and_other_inductor_options():
    model, x = network(), image()
    check(compiled(model, cpp_wrapper=True), model, x)
