"""`explain`: the table, the page, JSON, generated sources."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import tiny_models
import torch
from rich.console import Console

import blocksparse_compiler as bsc
from blocksparse_compiler import sources
from blocksparse_compiler.devices import SPECS
from blocksparse_compiler.errors import LayerError, OptionError
from blocksparse_compiler.plan import Plan

DEVICE = "avx512-2core"


@pytest.fixture(scope="module")
def explanation():
    return bsc.explain(tiny_models.make(), torch.randn(tiny_models.INPUT), device=DEVICE)


def test_every_layer_has_a_decision_and_a_reason(explanation):
    assert [d.site.name for d in explanation.plan] == ["0", "3", "4", "7"]
    assert [d.is_block_sparse for d in explanation.plan] == [True, False, True, False]
    assert explanation.plan["3"].kernel == "cpu_f32_depthwise"
    assert all(d.reason for d in explanation.plan)
    assert explanation.device is SPECS[DEVICE] and explanation.plan.device == DEVICE


def test_the_model_is_left_alone():
    model = tiny_models.make()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    bsc.explain(model, torch.randn(tiny_models.INPUT), device=DEVICE)
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0] and torch.equal(value, before[name][1])


def test_text_has_every_layer_and_the_total(explanation):
    text = str(explanation)
    for decision in explanation.plan:
        assert re.search(rf"│ {decision.site.name} +│", text)
    assert "2 of 4 layers block-sparse" in text
    assert "dense on its own kernel" in text
    assert "\x1b" not in text
    assert str(explanation.plan).splitlines()[1:] == text.splitlines()[2:]  # but for the title


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_every_width_keeps_layers_and_reasons(explanation, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(explanation)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    header = next(line for line in lines if "layer" in line)
    assert "why" in header and ("shape" in header) == (width >= 90) and ("dense" in header) == (width >= 130)
    last_column = "".join("".join(line.split("│")[-2:-1]) for line in lines)
    folded = "".join(last_column.split())
    assert all("".join(d.reason.split()) in folded for d in explanation.plan)


def test_names_with_markup_are_printed_as_they_are():
    from blocksparse_compiler.plan import Decision, Site

    site = Site("blocks[0].[red]conv", "conv", "linear", 8, 8, input_shape=(1, 8))
    assert "blocks[0].[red]conv" in str(Plan((Decision(site, "dense", "stays dense: [x] <y>"),)))


def test_an_empty_plan_prints():
    assert "0 of 0 layers" in str(Plan())


def test_totals_are_sums(explanation):
    totals = explanation.totals
    assert totals.dense == pytest.approx(sum(d.estimates["dense"] for d in explanation.plan))
    assert totals.chosen == pytest.approx(sum(d.estimates[d.kernel] for d in explanation.plan))
    assert totals.speedup > 1 and (totals.layers, totals.sparse) == (4, 2)


class _Balanced(HTMLParser):
    """Fails on a tag that is not closed."""

    void = ("meta", "br", "link")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page(explanation, tmp_path):
    path = explanation.to_html(tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open
    assert page.count("<tr ") == len(explanation.plan)
    assert all(d.reason in page for d in explanation.plan)
    assert "http" not in page and "<script" not in page  # self-contained
    assert explanation._repr_html_() == page


def test_json_round_trip(explanation):
    data = json.loads(json.dumps(explanation.to_json()))
    assert Plan.from_json(data["plan"]).digest == explanation.plan.digest
    assert bsc.explain.__module__ and data["device"]["name"] == DEVICE


def test_options():
    model, x = tiny_models.make(), torch.randn(tiny_models.INPUT)
    forced = bsc.explain(model, x, device=DEVICE, block_shape=(16, 16))
    assert forced.plan["0"].pattern.block_shape == (16, 16)
    with pytest.raises(OptionError, match="auto"):
        bsc.explain(model, x, dense="always")
    with pytest.raises(OptionError, match="avx512-2core"):
        bsc.explain(model, x, device="abacus")
    with pytest.raises(LayerError):
        bsc.explain(model, torch.randn(2, 3, 4, 4), device=DEVICE)


def test_sources_of_another_machine_are_refused(explanation):
    other = bsc.explain(tiny_models.make(), torch.randn(tiny_models.INPUT), device="avx512-16core")
    with pytest.raises(OptionError, match="avx512-16core"):
        _ = other.kernels


def test_sources():
    model, x = tiny_models.make(), torch.randn(tiny_models.INPUT).to(memory_format=torch.channels_last)
    explanation = bsc.explain(model, x, dense="never")
    sparse = [d.site.name for d in explanation.plan if not d.is_dense]
    assert sparse and list(explanation.kernels) == sparse
    first, second = (explanation.kernels[name] for name in ("0", "4"))
    assert 'extern "C"' in first and "block_sparse" in first
    assert first != second
    assert "<details>" in explanation._repr_html_()


def test_no_sources_without_sparse_layers():
    dense = bsc.explain(torch.nn.Linear(8, 8), torch.randn(32, 8))
    assert dense.kernels == {}


GENERATED = """
_frozen_param0 = None  # device(type='cpu') torch.float32 (2, 4, 4) (16, 4, 1) 7f00
_frozen_param1 = None  # device(type='cpu') torch.int32 (1, 3) (3, 1) 7f01
_frozen_param2 = None  # device(type='cpu') torch.float32 (3, 4, 4) (16, 4, 1) 7f02
cpp_fused_a_0 = async_compile.cpp_pybinding(['const float*', 'float*'], r'''
first source
''')
cpp_fused_b_1 = async_compile.cpp_pybinding(['const float*', 'float*'], '''
second source
''')
class Runner:
    def call(self, args):
        cpp_fused_b_1(arg0_1, _frozen_param2, _frozen_param1, buf0)
        cpp_fused_a_0(buf0, _frozen_param0, _frozen_param1, buf1)
"""


def test_sources_are_matched_by_shape():
    from blocksparse_compiler import BlockPattern
    from blocksparse_compiler.plan import Decision, Site

    def decision(name, kept):
        pattern = BlockPattern.full((8, 8), (4, 4))
        pattern = pattern.with_kept((torch.arange(4) < kept).reshape(2, 1, 2))
        return Decision(Site(name, name, "linear", 8, 8), "cpu_f32", "", pattern)

    found = sources.assign([decision("two", 2), decision("three", 3), decision("four", 4)], GENERATED)
    assert found == {"two": "first source", "three": "second source"}
