"""Over several processes: all hear the mean of their metrics and decide alike; edits, and both over a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import batch, loss_of, make_fsdp, make_net, my_rows, same_on_all_ranks
from references import BACKENDS
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import lr_scheduler
from worlds import in_processes

from nexus.optim import FusedAdamW
from nexus.schedules import Constant, Cosine, Linear, ReduceOnPlateau

OPTIONS: dict[str, Any] = {"factor": 0.5, "patience": 1}
METRICS = torch.tensor([[1.0, 3.0], [2.0, 0.5], [3.0, 0.0], [0.5, 3.5], [0.0, 3.0], [2.0, 2.0], [0.0, 9.0]])


@pytest.mark.parametrize(("size", "backend"), [(2, backend) for backend in (*BACKENDS, "triton")])
@in_processes(device="cpu")
def test_all_processes_hear_the_mean_and_decide_alike(backend: str, device: str) -> None:
    model = make_fsdp(device=device)
    optimizer = FusedAdamW(model.parameters(), lr=ReduceOnPlateau(Constant(0.01), **OPTIONS), backend=backend)
    theirs = lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=0.01), **OPTIONS)
    rates = []
    for step, metrics in enumerate(METRICS):
        optimizer.zero_grad()
        loss_of(model, *map(my_rows, batch(step, device=device))).backward()
        optimizer.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        assert rates[-1] == theirs.optimizer.param_groups[0]["lr"]
        mine = metrics[dist.get_rank()].to(device)
        optimizer.report(mine)
        assert mine == metrics[dist.get_rank()]  # a copy is reduced
        theirs.step(metrics.mean())
    assert len(set(rates)) > 1
    optimizer.rewarm(3, to=0.02)
    state = optimizer.state_dict()["param_groups"][0]["lr_schedule"]
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, state)
    assert heard == [state] * dist.get_world_size()
    assert same_on_all_ranks(*(param.full_tensor() for param in model.parameters()))


@pytest.mark.parametrize("size", [2])
@in_processes(device="cpu")
def test_a_group_of_processes_may_be_named(device: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(2, device=device))
    optimizer = FusedAdamW([weight], lr=ReduceOnPlateau(Constant(1.0), factor=0.5, patience=0))
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    optimizer.report(1.0, process_group=alone)
    optimizer.report(0.5 if dist.get_rank() else 2.0, process_group=alone)
    weight.grad = torch.ones(2, device=device)
    optimizer.step()
    assert float(optimizer.param_groups[0]["lr"]) == (1.0 if dist.get_rank() else 0.5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("inner", [Constant(0.1), Cosine(peak_lr=0.1, total_steps=30)], ids=repr)
@pytest.mark.parametrize("plateau", [False, True])
def test_torchs_checkpoints_have_edits_and_reports(tmp_path: Path, inner: Any, plateau: bool) -> None:
    schedule = ReduceOnPlateau(inner, **OPTIONS) if plateau else inner

    def make() -> tuple[torch.nn.Module, FusedAdamW]:
        model = make_net()
        return model, FusedAdamW(model.parameters(), lr=schedule)

    def train(model: torch.nn.Module, optimizer: FusedAdamW, steps: range) -> list[float]:
        rates = []
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, *batch(step)).backward()
            optimizer.step()
            if plateau:
                optimizer.report(1.0)
            if step == 3:
                optimizer.replace(Linear(start_lr=0.2, end_lr=0.0, total_steps=9))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return rates

    model, optimizer = make()
    train(model, optimizer, range(7))
    dcp.save(dict(zip("mo", get_state_dict(model, optimizer), strict=True)), checkpoint_id=tmp_path)
    model_again, again = make()
    state = dict(zip("mo", get_state_dict(model_again, again), strict=True))
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(model_again, again, model_state_dict=state["m"], optim_state_dict=state["o"])
    expected = train(model, optimizer, range(7, 12))
    assert train(model_again, again, range(7, 12)) == expected
    assert again.schedule == optimizer.schedule
    assert len(set(expected)) == 5
