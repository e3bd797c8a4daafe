"""Each benchmark runs from end to end on a small case, and refuses to time a wrong result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import (
    decode,
    engines,
    layers,
    models,
    never_slower,
    periodic,
    pictures,
    readme,
    shapes,
    training,
    zoo,
)
from benchmarks.ours import compile_layers, newest_plan

BLOCK = (32, 32)


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.no_grad():
        yield


def test_layer_rows_hold_both_modes_and_their_errors(tmp_path: Path) -> None:
    case = layers.Case(shapes.ConvShape(64, 14, 64, 3), 1, "32x32", "relu")
    rows = list(layers.measure(case, (1.0, 0.5), budget=0, copies=2))
    assert [row["kept"] for row in rows] == [1.0, 0.5]
    for row in rows:
        assert set(row["speedup"]) == {"auto", "forced"}
        assert set(row["dense"]) == {"eager", "onednn", "inductor"}
        assert row["error"] < 1e-5
    # A dense weight has no zero block: only when forced does it run on the sparse kernel.
    assert rows[0]["kernel"] == "dense"
    pictures.print_layers(rows)
    pictures.draw_layers(rows, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 1000


def test_rows_of_few_rows(capsys: pytest.CaptureFixture[str]) -> None:
    case = layers.Case(shapes.LinearShape(512, 512, 1), 4, "16x1", "none")
    (row,) = layers.measure(case, (0.25,), budget=0)
    assert row["kernel"] == "cpu_f32" and row["error"] < 1e-5
    decode.print_rows([{**row, "weight_gb_per_s": 1.0}])
    assert "512->512" in capsys.readouterr().out
    assert readme.decode({"rows": [row]}).splitlines()[2].startswith("| 16x1 | 4 |")


def test_engines_compute_what_torch_does() -> None:
    """Those that are installed; none is no failure."""
    module = engines.Several([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)], relu=True)
    x = torch.randn(1, 8, 5, 5)
    for call in engines.engine_calls(module, x).values():
        assert engines.agrees(call(), module(x))
    assert not engines.agrees([y + 0.01 for y in module(x)], module(x))


def test_a_dense_layer_can_be_forced_onto_the_sparse_kernel() -> None:
    shape = shapes.ConvShape(64, 7, 32, 1)
    layer, x = shape.layer().eval(), shape.input(1)
    ours = compile_layers([layer], x, False, BLOCK)
    assert ours.kernel == "dense"
    (decision,) = newest_plan()
    assert not decision.is_dense
    assert decision.density == 1
    torch.testing.assert_close(ours.calls["forced"](), [layer(x)])


def test_a_wrong_layer_is_not_timed() -> None:
    layer = shapes.ConvShape(32, 7, 32, 1).layer().eval()
    x = shapes.ConvShape(32, 7, 32, 1).input(1)
    ours = compile_layers([layer], x, False, BLOCK)
    wrong = replace(ours, calls={"auto": lambda: [layer(x) * 1.001]})
    with pytest.raises(RuntimeError, match="nothing was timed"):
        layers.check(wrong, [layer], x, False)


def _small() -> zoo.Network:
    model = nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 32)).eval()
    return zoo.Network(model, model, lambda batch: torch.randn(batch, 32, 4, 4))


def test_model_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(zoo.NETWORKS, "small", _small)
    (row,) = models.measure("small", 2, ("0.5",), BLOCK, budget=0)
    assert row["sparse_layers"] + row["dense_layers"] == 2
    assert row["kept"] == pytest.approx(0.5, abs=0.01)
    assert row["speedup"] > 0
    models.print_models([row])
    pictures.draw_models([row], tmp_path / "models.png")
    assert (tmp_path / "models.png").exists()


def test_rows_of_periodic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1)
        )

    monkeypatch.setitem(periodic.NETWORKS, "small", build)
    (row,) = periodic.measure("small", 1, 12, ("PS1_P4",), budget=0)
    assert row["sparse_layers"] + row["dense_layers"] == 3
    assert row["kept_macs"] == pytest.approx(0.2, abs=0.1)
    periodic.print_rows([row])
    assert readme.periodic({"rows": [row]}).count("\n") == 2


def test_a_wrong_model_is_not_timed() -> None:
    network = _small()
    x = network.input(2)
    with pytest.raises(RuntimeError, match="nothing was timed"):
        models.check(lambda x: network.model(x) * 1.01, network, x)


def test_the_masks_of_dbsr_leave_the_published_shares_of_resnet50() -> None:
    _, kept = models.pruned("resnet50", "DBSR-B", BLOCK)
    assert kept == pytest.approx(13.36 / 25.56, abs=0.005)


def test_training_rows_hold_both_forms_and_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(stage: str, batch: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(256, 256, 1), nn.ReLU(), nn.Conv2d(256, 256, 1))
        x = torch.randn(batch, 256, 14, 14).to(memory_format=torch.channels_last).requires_grad_()
        return model, x, torch.randn(batch, 256, 14, 14)

    monkeypatch.setattr(training, "build", build)
    with torch.enable_grad():
        rows = list(training.measure("layer3", 2, 32, (0.25,), budget=0))
    assert [row["form"] for row in rows] == ["masked", "folded"]
    for row in rows:
        assert set(row["dense"]) == {"eager", "inductor"}
        assert row["sparse_layers"] == 2
        assert row["error"] < 1e-5
    training.print_rows(rows)
    assert readme.training({"rows": rows}).count("\n") == 3


def test_a_wrong_training_step_is_not_timed() -> None:
    model = nn.Linear(4, 4)
    x, grad = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    with torch.enable_grad():
        step = training.training_step(model, model, x, grad)
        wrong = lambda: [1.01 * g for g in step()]  # noqa: E731
        with pytest.raises(RuntimeError, match="nothing was timed"):
            training.check(wrong, model, x, grad)


def test_layers_drawn_at_random(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = never_slower.cases(40, seed=1)
    assert drawn == never_slower.cases(40, seed=1) != never_slower.cases(40, seed=2)
    assert len(set(drawn)) == 40 and len({type(case.shape) for case in drawn}) == 3
    assert all(case.shape.macs * case.batch <= never_slower.MOST_MACS for case in drawn)
    shape = shapes.Conv1dShape(32, 50, 64, 3)
    chosen = [never_slower.Case(shape, 1, BLOCK, d, torch.float32) for d in (1.0, 0.5)]
    rows = list(never_slower.measure(chosen, budget=0))
    assert [set(row["dense"]) for row in rows] == [{"eager", "inductor"}] * 2
    assert rows[0]["kernel"] == "dense" and all(row["error"] < 1e-5 for row in rows)
    never_slower.print_rows(rows)
    assert "on our kernels: 1 layers" in capsys.readouterr().out


def test_ratios_of_random_layers_are_counted() -> None:
    ratios = {"dense": [1.0, 0.94, 0.99], "cpu_f32": [2.0, 0.5, 1.0, 7.0]}
    rows = [{"kernel": kernel, "speedup": r} for kernel, values in ratios.items() for r in values]
    counts = never_slower.histogram(rows)
    assert sum(counts.values()) == 7
    assert (counts["0-0.9"], counts["0.9-0.95"], counts["1-1.05"], counts["3-inf"]) == (1, 1, 2, 1)
    lines = readme.never_slower({"rows": rows}).splitlines()[2:]
    assert lines[0] == "| on our kernels | 4 | **1.63×** | 1 | 0.50× |"
    assert lines[1] == "| left dense | 3 | **0.98×** | 1 | 0.94× |"
