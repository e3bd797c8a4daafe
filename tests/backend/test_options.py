from __future__ import annotations

import pytest
import torch

from blocksparse_compiler.errors import OptionError, PatternError, PlanError
from blocksparse_compiler.options import BackendOptions
from blocksparse_compiler.plan import Plan


def test_ours_and_inductors_are_split():
    options = BackendOptions.parse(
        {"dense": "never", "block_shape": [16, 8], "max-autotune": True, "cpp.threads": 1}
    )
    assert options.dense == "never" and options.block_shape == (16, 8)
    assert options.inductor == {"max_autotune": True, "cpp.threads": 1}


def test_unknown_option_lists_the_valid_ones_and_suggests():
    with pytest.raises(
        OptionError, match=r"autotune.*block_shape.*dense.*dump_dir.*'autotun'.*Did you mean 'autotune'"
    ):
        BackendOptions.parse({"autotun": True})


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"dense": "sometimes"}, OptionError, "auto, never"),
        ({"guard": "none"}, OptionError, "sample, full, version"),
        ({"autotune": 1}, OptionError, "True or False"),
        ({"block_shape": (0, 8)}, PatternError, "positive"),
        ({"block_shape": 8}, PatternError, "positive"),
        ({"plan": 3}, OptionError, "Plan"),
    ],
)
def test_bad_values(bad, error, words):
    with pytest.raises(error, match=words):
        BackendOptions.parse(bad)


def test_a_plan_may_be_a_path(tmp_path):
    Plan(device="cpu").save(tmp_path / "plan.json")
    assert BackendOptions.parse({"plan": str(tmp_path / "plan.json")}).plan == Plan(device="cpu")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(PlanError, match="blocksparse plan"):
        BackendOptions.parse({"plan": tmp_path / "other.json"})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PlanError, match="JSON"):
        BackendOptions.parse({"plan": tmp_path / "broken.json"})


def test_errors_reach_the_user_of_torch_compile():
    with pytest.raises(Exception, match=r"dump_dir.*'frezing'"):
        torch.compile(torch.nn.Linear(4, 4), backend="blocksparse", options={"frezing": True})(
            torch.randn(1, 4)
        )
