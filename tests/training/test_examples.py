"""The examples that compare methods, small."""

import statistics

import pytest

from examples import compare_methods, planted_support


def test_planted_support_is_found():
    """Over five seeds; the margins leave room for another machine's rounding."""
    scores = {
        name: [planted_support.run(method, seed) for seed in range(5)]
        for name, method in planted_support.METHODS.items()
    }

    def mean(name, field):
        return statistics.mean(getattr(score, field) for score in scores[name])

    learned = [name for name in scores if name != "random"]
    assert all(min(mean(name, "precision"), mean(name, "recall")) > 0.85 for name in learned)
    assert mean("random", "precision") < 0.5
    exact, magnitude = "exact budget (scales)", "block magnitude, gradual"
    assert mean(exact, "recall") > max(0.9, mean(magnitude, "recall") - 0.02)
    assert mean("DBSR", "test_error") < mean(magnitude, "test_error")
    assert all(score.kept == 0.25 for name in learned if name != "DBSR" for score in scores[name])


def test_every_method_trains_folds_compiles_and_is_drawn(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    rows = compare_methods.compare((0.2,), 1, 1, "cpu")
    assert [row.method for row in rows] == [
        "dense", "DBSR", "exact budget", "attention", "magnitude", "random", "band", "periodic",
    ]  # fmt: skip
    kept = {row.method: row.kept[0] for row in rows}
    assert kept["dense"] == 1
    for method in ("exact budget", "attention", "magnitude", "random", "band"):
        assert kept[method] == pytest.approx(0.2, abs=0.02)
    assert kept["periodic"] == pytest.approx(2 / 9)
    assert all(row.compiled for row in rows)
    compare_methods.print_table(rows, "cpu")
    assert "held-out accuracy" in capsys.readouterr().out
    assert compare_methods.draw(rows, tmp_path / "methods.png").stat().st_size > 10_000
