"""Inductor and Triton see a GPU inside the context, and nothing of it outside."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.device_interface import device_interfaces, get_interface_for_device
from torch._inductor.runtime.hints import DeviceProperties
from torch.utils._triton import has_triton

from blocksparse_compiler.codegen.mock_gpu import TARGETS, GpuTarget, gpu_target, mock_gpu
from blocksparse_compiler.errors import BlockSparseError
from blocksparse_compiler.gpu_devices import SPECS as GPU_SPECS

triton = pytest.importorskip("triton", reason="Triton is not installed")

CUDA = torch.device("cuda", 0)


def state() -> tuple:
    get_interface_for_device("cpu")  # registers the real interfaces
    functions = (
        torch.cuda.get_device_capability,
        torch.cuda.get_device_properties,
        torch.cuda.current_device,
    )
    driver = triton.runtime.driver._active
    return (*functions, dict(device_interfaces), has_triton(), torch.version.hip, driver)


@pytest.mark.parametrize("name", TARGETS)
def test_inductor_sees_the_target_and_later_nothing(name):
    before = state()
    target = gpu_target(name)
    with mock_gpu(name) as seen:
        assert seen is target and has_triton()
        properties = DeviceProperties.create(CUDA)
        assert (properties.type, properties.cc) == (target.backend, target.arch)
        assert properties.multi_processor_count == target.multiprocessors
        assert triton.runtime.driver.active.get_current_target() == target.triton_target()
        assert torch.cuda.get_device_capability() == target.capability
    assert state() == before


def test_contexts_nest_and_repeat():
    before = state()
    for _ in range(2):
        with mock_gpu("sm_90"):
            with mock_gpu("gfx942"):
                assert DeviceProperties.create(CUDA).cc == "gfx942" and torch.version.hip
            assert DeviceProperties.create(CUDA).cc == 90 and not torch.version.hip
    assert state() == before


def test_state_returns_after_an_error():
    before = state()
    with pytest.raises(ZeroDivisionError), mock_gpu("sm_80"):
        _ = 1 / 0
    assert state() == before


@pytest.mark.parametrize("spec", GPU_SPECS.values(), ids=GPU_SPECS)
def test_targets_of_devices(spec):
    target, known = gpu_target(spec), TARGETS[spec.target]
    assert gpu_target(known) is known and target.device_name == spec.name
    for field in ("backend", "arch", "warp_size", "shared_memory_bytes", "capability"):
        assert getattr(target, field) == getattr(known, field), field


@pytest.mark.parametrize("name", ["sm_90a", "h200", "", "sm90"])
def test_unknown_targets_are_named_with_the_known_ones(name):
    with pytest.raises(BlockSparseError, match="gfx942"):
        gpu_target(name)


def test_missing_triton_is_one_clear_error(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BlockSparseError, match="pip install"), mock_gpu("sm_90"):
        pass


def test_targets_are_plausible():
    for name, target in TARGETS.items():
        assert target.name == name and isinstance(target, GpuTarget)
        assert target.warp_size == (32 if target.is_nvidia else 64)
        assert 1 << 15 <= target.shared_memory_bytes <= 1 << 18
