"""Every kernel on a real GPU, in every dtype and geometry, against plain torch in float64."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import pytest
import torch
from gpu_cases import BFLOAT, FLOAT, HALF, GpuCase, GpuLayers, assert_close_to_float64
from on_gpu import GPU, codegen_test

from blocksparse_compiler.codegen import lowerings
from blocksparse_compiler.devices import device
from blocksparse_compiler.variants import VARIANTS

pytest.importorskip("triton")
pytestmark = GPU

ONE = (1, 1, 1, 1)
LISTS = {
    "test_gpu_kernels": ("GEOMETRIES", "CONFIGURATIONS", "DECODE"),
    "test_gpu_box": ("BOXED", "POINTERS"),
    "test_gpu_pair": ("CASES",),
}
ALONE_SECONDS = 120
"""To find out which layers are at fault when all together fail."""


def compiled(module: torch.nn.Module):
    torch._dynamo.reset()
    lowerings.register()
    return torch.compile(module, fullgraph=True, dynamic=False)


def outputs(module: GpuLayers, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of all layers on the GPU, as CPU tensors."""
    there = copy.deepcopy(module).cuda()
    fast = compiled(there)
    placed = [x.cuda() for x in xs]
    with torch.no_grad():
        first = [y.clone() for y in fast(placed)]
        again = fast(placed)
    for case, a, b in zip((layer.case for layer in module.layers), first, again, strict=True):
        assert torch.equal(a, b), f"{case}: two runs differ"
    return [y.cpu() for y in first]


def check(cases: list[GpuCase]) -> None:
    """All layers as one program, which compiles on all processors; one by one if that fails."""
    try:
        wrong = failures(cases)
    except Exception as error:
        wrong, began = [f"all together: {type(error).__name__}: {error}"[:500]], time.monotonic()
        for case in cases:
            if time.monotonic() - began > ALONE_SECONDS:
                wrong.append("... not all were tried alone")
                break
            try:
                wrong += failures([case])
            except Exception as error:
                wrong.append(f"{case}: {type(error).__name__}: {error}"[:500])
    assert not wrong, "\n".join(wrong)


def failures(cases: list[GpuCase]) -> list[str]:
    """A line for every layer that is wrong."""
    module = GpuLayers(cases)
    xs = [case.input() for case in cases]
    wrong = []
    for layer, x, out in zip(module.layers, xs, outputs(module, xs), strict=True):
        try:
            if layer.case.dtype == FLOAT:
                assert_fp32(layer, x, out)
            else:
                assert_close_to_float64(layer, x, out)
        except AssertionError as error:
            wrong.append(str(error).splitlines()[0])
    return wrong


def assert_fp32(layer, x, out, limit: float = 1e-5) -> None:
    exact = layer.reference(x)
    assert out.shape == exact.shape
    error = (out - exact).norm()
    assert error <= limit * exact.norm() + 1e-30, f"{layer.case}: error {error / exact.norm():.1e}"


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
def test_cases_of_the_interpreter(dtype):
    files = {file: codegen_test(file) for file in LISTS}
    cases = [case for file, names in LISTS.items() for name in names for case in getattr(files[file], name)]
    check([replace(case, dtype=dtype, seed=i) for i, case in enumerate(cases)])


def resnet_layers(variant: str) -> list[GpuCase]:
    """Real sizes, in the parameters that this GPU would get."""
    from layer_cases import conv_site, even_pattern

    found = []
    for channels, size, kernel, stride, block in (
        (64, 56, 3, 1, (64, 64)),
        (256, 14, 3, 1, (64, 64)),
        (512, 7, 3, 1, (64, 32)),
        (128, 56, 3, 2, (32, 32)),
        (256, 14, 1, 1, (128, 64)),
        (256, 14, 3, 1, (16, 16)),
    ):
        pad = kernel // 2
        site = conv_site(
            channels, channels, kernel, size, 32, stride=(stride,) * 2, padding=((pad, pad),) * 2
        )
        site = replace(site, dtype="bfloat16", device="cuda:0")
        pattern = even_pattern(site, 0.4, block)
        row = VARIANTS[variant]
        if row.unsupported(site, pattern) is not None:
            continue
        for config in row.configs(site, pattern, device("cuda")):
            shape = (8, channels, size, size)
            sides = ((kernel,) * 2, (stride,) * 2, (pad,) * 4)
            case = GpuCase(shape, channels, sides[0], block, stride=sides[1], padding=sides[2], density=0.4)
            found.append(replace(case, variant=variant, parameters=dict(config)))
    return found


@pytest.mark.parametrize(
    "variant", [n for n, v in VARIANTS.items() if v.device == "cuda" and "conv2d" in v.ops]
)
def test_every_parameter_set_at_real_sizes(variant):
    check(resnet_layers(variant))


def test_tf32():
    parameters = {"precision": "tf32", "pixels": 64}
    case = GpuCase((4, 64, 14, 14), 64, (3, 3), (32, 32), FLOAT, padding=ONE, parameters=parameters)
    module = GpuLayers([case])
    (out,) = outputs(module, [case.input()])
    assert_fp32(module.layers[0], case.input(), out, limit=2e-3)


@pytest.mark.parametrize("variant", ["triton_gather", "triton_box", "triton_pair"])
def test_tensors_of_more_than_2_31_elements(variant):
    """Offsets must be 64 bits wide; boxes and the last image are where they would overflow first."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    batch = 2**31 // (64 * 128 * 128) + 3
    parameters: dict[str, int | str] = {"pixels": 128}
    if variant != "triton_gather":
        parameters = {"pixels": 128, "box_n": 1, "box_h": 8, "box_w": 16}
    if variant == "triton_pair":
        parameters["box"] = 1
    case = GpuCase(
        (2, 64, 128, 128), 128, (3, 3), (64, 64), padding=ONE, variant=variant, parameters=parameters
    )
    module = GpuLayers([case])
    layer, there = module.layers[0], copy.deepcopy(module).cuda()
    x = torch.empty(batch, 64, 128, 128, dtype=BFLOAT, device="cuda").to(memory_format=torch.channels_last)
    x.normal_()
    with torch.no_grad():
        (out,) = compiled(there)([x])
    for image in (0, batch // 2, batch - 1):
        picked = x[image : image + 1].cpu()
        assert_close_to_float64(layer, picked, out[image : image + 1].cpu())


def test_many_runs_agree():
    """A missing barrier shows as results that move."""
    cases = [
        GpuCase((8, 128, 14, 14), 128, (3, 3), (64, 32), padding=ONE, parameters={"pixels": 128}),
        GpuCase((16, 1024), 1024, (), (64, 64), variant="triton_decode", parameters={"split": 4}),
    ]
    module = GpuLayers(cases).cuda()
    xs = [case.input().cuda() for case in cases]
    fast = compiled(module)
    with torch.no_grad():
        first = [y.clone() for y in fast(xs)]
        for _ in range(200):
            for a, b in zip(first, fast(xs), strict=True):
                assert torch.equal(a, b)
