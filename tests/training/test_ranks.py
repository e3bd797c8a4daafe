"""Data parallel: two gloo processes on loopback against one process."""

import json
import shutil
import warnings

import pytest
import rank_cases as cases
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def spawn(function, folder, *args):
    """Runs two ranks. On a very busy machine gloo can lose a connection: those are started once more."""
    try:
        mp.spawn(function, (2, str(folder), *args), nprocs=2, join=True)
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        if not isinstance(error, mp.ProcessExitedException) and "onnection" not in str(error):
            raise
        warnings.warn(f"ranks started again after: {error}", stacklevel=2)
        for file in folder.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        mp.spawn(function, (2, str(folder), *args), nprocs=2, join=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_are_one_process(kind, tmp_path):
    """Same masks on both ranks and as one process has, same weights up to rounding; resumed to the bit."""
    spawn(cases.train_in_parallel, tmp_path, kind)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for mode in cases.OPTIONS:
        model, sparsifier = cases.build(mode)
        cases.train(model, sparsifier, cases.optimizer_of(sparsifier), range(cases.STEPS))
        assert 0 < sparsifier.density < 1
        for straight, resumed in (rank[mode] for rank in ranks):
            for end in (straight, resumed):
                assert all(torch.equal(a, b) for a, b in zip(end["masks"], sparsifier.masks, strict=True))
            assert straight["state"].keys() == resumed["state"].keys()
            assert all(
                torch.equal(straight["state"][key], resumed["state"][key]) for key in straight["state"]
            )
        expected = model.state_dict()
        for key, tensor in ranks[0][mode][0]["state"].items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)


def test_ranks_that_differ_or_die_are_named(tmp_path):
    spawn(cases.disagree, tmp_path)
    told = [json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in range(2)]
    for rank in range(2):
        assert ": expected the same mask on all ranks, got different ones. Seed all" in told[rank]["differ"]
    assert told[0]["dies"].startswith("rank 0: expected an answer from all 2 ranks, got none:")
    assert told[0]["dies"].endswith("Restart all ranks from a checkpoint. frozen=False")
