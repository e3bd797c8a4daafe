"""pSConv in memory and in multiply-accumulates: sizes by hand, MACs as the paper prints them."""

import math

import pytest
import torch
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler import PeriodicKernels
from blocksparse_compiler.errors import LayerError, PatternError
from blocksparse_compiler.periodic_storage import PeriodicWeight, storage_bytes
from examples.paper_networks import NETWORKS

SCHEMES = {
    "dense": None,
    "PS4_P4": PeriodicKernels(4, 4),
    "PSD4_P8": PeriodicKernels(4, 8, boosted=True),
    "PSD4_P16": PeriodicKernels(4, 16, boosted=True),
    "PSD2_P8": PeriodicKernels(2, 8, boosted=True),
    "PSD1_P8": PeriodicKernels(1, 8, boosted=True),
    "PSD1_P16": PeriodicKernels(1, 16, boosted=True),
}


def masked(scheme, *shape):
    return scheme.pattern("conv", shape, 1).apply(torch.randn(*shape))


@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "dense"])
def test_storage_is_values_and_one_table(name):
    scheme, (o, c) = SCHEMES[name], (32, 48)
    n, p, boosted = scheme.support, scheme.period, scheme.boosted
    kept = c * o * ((p - 1) * n + 9) // p if boosted else c * o * n  # the paper's formula
    sizes = storage_bytes(masked(scheme, o, c, 3, 3), scheme)
    assert sizes == {
        "dense": 4 * o * c * 9,
        "bitmap": 4 * kept + o * c * 9 // 8,
        "csr": 8 * kept + 4 * (o + 1),
        "periodic": 4 * kept + math.ceil(9 * p / 8),
    }


@pytest.mark.parametrize("shape", [(32, 48, 3, 3), (5, 3, 5, 4), (1, 1, 3, 2, 2)])
@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "dense"])
def test_packing_round_trips_to_the_byte(name, shape):
    scheme = SCHEMES[name]
    weight = masked(scheme, *shape)
    packed = PeriodicWeight.from_dense(weight, scheme)
    assert torch.equal(packed.to_dense(), weight)
    data = packed.to_bytes()
    assert len(data) == packed.nbytes + 20 + 4 * (len(shape) - 2)
    again = PeriodicWeight.from_bytes(data)
    assert torch.equal(again.to_dense(), weight)
    assert again.to_bytes() == data


def test_bad_weights_and_bad_bytes():
    scheme = SCHEMES["PS4_P4"]
    with pytest.raises(LayerError, match="zeros outside the pattern"):
        PeriodicWeight.from_dense(torch.ones(4, 4, 3, 3), scheme)
    with pytest.raises(PatternError, match="a kernel larger than 1x1"):
        PeriodicWeight.from_dense(torch.ones(4, 4, 1, 1), scheme)
    data = PeriodicWeight.from_dense(masked(scheme, 4, 4, 3, 3), scheme).to_bytes()
    for wrong in (b"", b"spam" + data[4:], data[:-4], data[:25], data + b"1"):
        with pytest.raises(PatternError, match="what to_bytes wrote"):
            PeriodicWeight.from_bytes(wrong)


def test_it_beats_bitmap_and_csr_by_their_index():
    scheme = SCHEMES["PSD1_P16"]
    sizes = storage_bytes(masked(scheme, 64, 64, 3, 3), scheme)
    assert sizes["periodic"] < sizes["bitmap"] < sizes["csr"] < sizes["dense"]


# ---- the paper's table --------------------------------------------------------------------------------

PRINTED = {  # GMACs in the order of SCHEMES; side of the images
    ("vgg16", 32): (0.314, 0.141, 0.162, 0.152, 0.102, 0.071, 0.054),
    ("resnet18", 32): (0.559, 0.253, 0.291, 0.272, 0.184, 0.130, 0.100),
    ("vgg16", 64): (1.255, 0.562, 0.645, 0.601, 0.406, 0.284, 0.215),
    ("resnet18", 64): (2.227, 1.005, 1.156, 1.081, 0.731, 0.518, 0.396),
}


def macs(network, side, scheme):
    model = NETWORKS[network](10 if side == 32 else 200)
    if scheme is not None:
        bsc.apply_pattern(model, scheme, include=nn.Conv2d)
    return bsc.sparsity_report(model, torch.zeros(1, 3, side, side)).total.macs


@pytest.mark.parametrize("name", SCHEMES)
def test_vgg16_on_cifar_10_is_the_papers_to_the_digit(name):
    """Convolutions and the one linear layer, rounded up to millions: all seven printed figures."""
    printed = PRINTED["vgg16", 32][list(SCHEMES).index(name)]
    assert math.ceil(macs("vgg16", 32, SCHEMES[name]) / 1e6) / 1e3 == printed


@pytest.mark.parametrize(("network", "side"), [key for key in PRINTED if key != ("vgg16", 32)])
def test_the_other_networks_within_seven_permille(network, side):
    """No one rule gives all seven figures of these columns; see docs/training.md."""
    for scheme, printed in zip(SCHEMES.values(), PRINTED[network, side], strict=True):
        assert macs(network, side, scheme) / 1e9 == pytest.approx(printed, rel=0.0075)
