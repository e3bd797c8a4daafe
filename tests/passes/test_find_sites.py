"""Every spelling of a convolution or linear layer is read the same way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blocksparse_compiler.passes import find_sites
from blocksparse_compiler.passes.calls import module_path
from blocksparse_compiler.trace import trace


def dynamo_graph(model: nn.Module, *inputs: torch.Tensor) -> torch.fx.GraphModule:
    graphs = []

    def capture(gm, _):
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=capture, fullgraph=True)(*inputs)
    return graphs[0]


def sites_of(model: nn.Module, *inputs: torch.Tensor):
    """The sites of both dialects, which must agree on everything but node names."""
    exported, captured = find_sites(trace(model, *inputs)), find_sites(dynamo_graph(model, *inputs))
    assert len(exported) == len(captured)
    for a, b in zip(exported, captured, strict=True):
        left, right = a.to_json(), b.to_json()
        for key in left.keys() - {"node", "epilogue"}:
            assert left[key] == right[key], key
    return exported


LAYERS = [
    (nn.Linear(12, 8), (3, 12)),
    (nn.Conv1d(4, 8, 3, padding=1, bias=False), (2, 4, 9)),
    (nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), (2, 4, 12, 12)),
    (nn.Conv2d(4, 8, 4, padding="same"), (2, 4, 9, 9)),
    (nn.Conv2d(4, 8, 3, padding="valid"), (2, 4, 9, 9)),
    (nn.Conv3d(4, 8, 3, stride=2, padding=1), (2, 4, 7, 7, 7)),
    (nn.ConvTranspose1d(4, 8, 3, stride=2), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 9, 9)),
    (nn.ConvTranspose3d(4, 8, 2, stride=2), (2, 4, 5, 5, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v))
def test_geometry_of_a_layer(layer, shape):
    model = nn.Sequential(layer)
    (site,) = sites_of(model, torch.randn(shape))
    assert (site.out_channels, site.in_channels) == (8, shape[1])
    assert site.bias == (layer.bias is not None)
    if isinstance(layer, nn.Linear):
        assert site.op == "linear" and site.kernel_size == ()
        return
    assert site.op == type(layer).__name__.lower().replace("transpose", "_transpose")
    assert site.kernel_size == layer.kernel_size and site.groups == layer.groups
    assert site.stride == layer.stride and site.dilation == layer.dilation
    assert site.output_spatial == tuple(model(torch.randn(shape)).shape[2:])


def test_same_padding_is_asymmetric_for_even_kernels():
    (site,) = sites_of(nn.Sequential(nn.Conv2d(4, 8, 4, padding="same")), torch.randn(1, 4, 9, 9))
    assert site.padding == ((1, 2), (1, 2))


def test_names_are_the_users():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.stem(x).mean((2, 3)))

    assert [s.name for s in sites_of(Net(), torch.randn(2, 3, 8, 8))] == ["stem.0", "head"]


def test_epilogue_stops_at_a_second_user():
    class Net(nn.Module):
        def __init__(self, fork):
            super().__init__()
            self.conv, self.fork = nn.Conv2d(4, 4, 1), fork

        def forward(self, x):
            y = self.conv(x)
            return (F.relu(y), y) if self.fork else F.relu(y) + x

    x = torch.randn(1, 4, 5, 5)
    assert find_sites(trace(Net(False), x))[0].epilogue == ("relu", "add")
    assert find_sites(trace(Net(True), x))[0].epilogue == ()


def test_symbolic_batch_is_a_string_and_sizes_follow():
    batch = torch.export.Dim("batch", min=1, max=64)
    gm = trace(nn.Sequential(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 9, 9), dynamic_shapes=({0: batch},))
    (site,) = find_sites(gm)
    assert isinstance(site.input_shape[0], str) and site.output_spatial == (7, 7)


def test_functional_layers_with_keyword_arguments():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 4, 3, 3))

        def forward(self, x):
            return F.conv2d(input=x, weight=self.w, padding=1, stride=(2, 2))

    (site,) = sites_of(Net(), torch.randn(1, 4, 8, 8))
    assert site.stride == (2, 2) and site.padding == ((1, 1), (1, 1)) and not site.bias


def test_an_unbatched_convolution_is_not_a_site():
    assert find_sites(trace(nn.Sequential(nn.Conv2d(4, 8, 3)), torch.randn(4, 9, 9))) == ()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self'].layer1.0.conv", "layer1.0.conv"),
        ("L['function'].__closure__[0].cell_contents.layer1.0.conv", "layer1.0.conv"),
        ("L['model']._modules['head']", "head"),
        ("layer1.0.conv", "layer1.0.conv"),
    ],
)
def test_module_paths(source, name):
    assert module_path(source) == name
