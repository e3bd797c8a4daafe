"""What the processes of the data-parallel tests do; importable by name, as spawned processes need."""

from __future__ import annotations

import faulthandler
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from blocksparse_compiler import BlockSparsifier, SparsitySchedule
from blocksparse_compiler.errors import LayerError

LR, STEPS, FREEZE = 0.1, 12, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "gamma": {"gamma": 0.6},
    "scales": {"target_density": 0.4, "importance": "scales"},
    "magnitude": {"target_density": 0.4, "importance": "magnitude"},
    "attention": {"target_density": 0.4, "importance": "attention"},
}


def build(mode: str, seed: int = 0) -> tuple[nn.Module, BlockSparsifier]:
    """No batch norm, so that half a batch on two ranks is the whole batch on one."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(6, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 1), nn.Flatten(), nn.Linear(192, 5)
    )
    schedule = SparsitySchedule(warmup=1, ramp=4, freeze=FREEZE)
    sparsifier = BlockSparsifier(model, (4, 3), schedule=schedule, **OPTIONS[mode])
    with torch.no_grad():
        for layer in sparsifier.layers:  # uneven, so that gamma prunes some in few steps
            for scale in layer.gate.parameters():
                scale.uniform_(0.1, 1)
    return model, sparsifier


def batch(step: int, part: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, 4, 4, generator=generator)
    return x[part], (x.mean((2, 3)).argmax(1) % 5)[part]


def train(
    wrapped: nn.Module, sparsifier: BlockSparsifier, optimizer: Any, steps: range, part: slice = slice(None)
) -> None:
    for step in steps:
        x, labels = batch(step, part)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), labels).backward()
        optimizer.step()
        sparsifier.step(LR)


def optimizer_of(sparsifier: BlockSparsifier) -> torch.optim.Optimizer:
    return torch.optim.SGD(sparsifier.param_groups(1e-3), LR, momentum=0.9)


def wrap(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model[4]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def whole_state(model: nn.Module) -> dict[str, Any]:
    options = sharded.StateDictOptions(full_state_dict=True)
    return {k: v.clone() for k, v in sharded.get_model_state_dict(model, options=options).items()}


def train_in_parallel(rank: int, world: int, folder: str, kind: str) -> None:
    """In every mode: trains, saving a checkpoint on the way; then again from it. Writes both ends."""
    _join(rank, world, folder)
    ends = {mode: _train_and_resume(rank, Path(folder) / mode, kind, mode) for mode in OPTIONS}
    torch.save(ends, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def _train_and_resume(rank: int, path: Path, kind: str, mode: str) -> list[dict[str, Any]]:
    part = slice(rank * 4, rank * 4 + 4)
    ends = []
    for first in (0, 5):
        model, sparsifier = build(mode, seed=first)  # the second starts from other weights, which it replaces
        wrapped = wrap(model, kind)
        optimizer = optimizer_of(sparsifier)
        if first:
            _load(path, model, optimizer, sparsifier)
            assert sparsifier.steps == first
        train(wrapped, sparsifier, optimizer, range(first, 5), part)
        if not first:
            _save(path, model, optimizer, sparsifier)
        train(wrapped, sparsifier, optimizer, range(5, STEPS), part)
        ends.append({"masks": [m.clone() for m in sparsifier.masks], "state": whole_state(model)})
        assert sparsifier.frozen
    return ends


def disagree(rank: int, world: int, folder: str) -> None:
    """Other seeds on each rank; then a rank that dies just before the freeze. Writes what they are told."""
    _join(rank, world, folder)
    told = {"differ": _told(build("magnitude", seed=rank)[1])}
    model, sparsifier = build("gamma")
    wrapped, optimizer = wrap(model, "ddp"), optimizer_of(sparsifier)
    train(wrapped, sparsifier, optimizer, range(0, 3), slice(rank * 4, rank * 4 + 4))
    ready = Path(folder) / "ready"
    if rank == 0:
        ready.touch()  # no gradient is under way any more: now the other may die
        told["dies"] = _told(sparsifier)
    else:
        while not ready.exists():
            time.sleep(0.05)
    (Path(folder) / f"told{rank}.json").write_text(json.dumps(told))
    os._exit(0)


def _told(sparsifier: BlockSparsifier) -> str:
    try:
        sparsifier.freeze()
    except LayerError as error:
        return f"{error} frozen={sparsifier.frozen}"
    return "nothing"


def _join(rank: int, world: int, folder: str) -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # a hang becomes a failure that shows where
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )


def _save(path: Path, model: nn.Module, optimizer: Any, sparsifier: BlockSparsifier) -> None:
    states = sharded.get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1], "sparsifier": sparsifier}, checkpoint_id=str(path))


def _load(path: Path, model: nn.Module, optimizer: Any, sparsifier: BlockSparsifier) -> None:
    states = sharded.get_state_dict(model, optimizer)
    parts = {"model": states[0], "optimizer": states[1]}
    dcp.load({**parts, "sparsifier": sparsifier}, checkpoint_id=str(path))
    sharded.set_state_dict(
        model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"]
    )
