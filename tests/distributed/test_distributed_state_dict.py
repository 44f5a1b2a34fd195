"""Each way in which torch.distributed.checkpoint.state_dict saves an optimizer, of one process and of two."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import SCHEDULE, Net, batch, loss_of, make_fsdp, my_rows, whole
from references import same_bits
from test_distributed_checkpoint import (
    DTYPE,
    END,
    STOP,
    alone,
    assert_same,
    make_optimizer,
    snapshot,
    train,
    uninterrupted,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from worlds import Worlds

from nexus.optim import FusedAdamW

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
]

WAYS: dict[str, dict[str, bool]] = {
    "nested": {},
    "nested, on the CPU": {"cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "flat, on the CPU": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
    "whole": {"full_state_dict": True},
}
FROM_RANK_0: dict[str, dict[str, bool]] = {
    "from rank 0": {"full_state_dict": True, "broadcast_from_rank0": True},
    "from rank 0, on the CPU": {"full_state_dict": True, "broadcast_from_rank0": True, "cpu_offload": True},
}


def new_model() -> Net:
    return make_fsdp(DTYPE) if dist.is_initialized() else alone()


def saved_by(model: torch.nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions) -> dict[str, Any]:
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    return {} if options.broadcast_from_rank0 and dist.get_rank() > 0 else saved


def goes_on_bit_for_bit(way: dict[str, bool]) -> None:
    options = StateDictOptions(**way)
    model = new_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, 0, STOP)  # the decay has begun
    saved, start = saved_by(model, optimizer, options), get_model_state_dict(model)
    resumed = new_model()
    resumed.load_state_dict(start)
    train(model, optimizer, STOP, END)
    expected = snapshot(model, optimizer)
    other = make_optimizer(resumed)
    set_optimizer_state_dict(resumed, other, saved, options=options)
    train(resumed, other, STOP, END)
    found = snapshot(resumed, other)
    assert list(found) == list(expected)
    assert same_bits(list(found.values()), list(expected.values()))


@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_one_process_goes_on_bit_for_bit(way: str) -> None:
    goes_on_bit_for_bit(WAYS[way])


@pytest.mark.parametrize("way", {**WAYS, **FROM_RANK_0})
def test_a_run_of_two_processes_goes_on_bit_for_bit(worlds: Worlds, way: str) -> None:
    worlds(2).run(goes_on_bit_for_bit, {**WAYS, **FROM_RANK_0}[way])


def make(kind: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if kind == "nexus":
        return FusedAdamW(model.parameters(), lr=SCHEDULE, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)


def train_either(model: Net, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        if not isinstance(optimizer, FusedAdamW):
            optimizer.param_groups[0]["lr"] = SCHEDULE(step)
        optimizer.zero_grad()
        x, y = batch(step, DTYPE)
        rows = my_rows if dist.is_initialized() else (lambda tensor: tensor)
        loss_of(model, rows(x), rows(y)).backward()
        optimizer.step()


def other_class_goes_on(first: str, second: str, way: dict[str, bool]) -> None:
    options = StateDictOptions(**way)
    expected = new_model()
    train_either(expected, make("torch", expected), 0, END)
    model = new_model()
    optimizer = make(first, model)
    train_either(model, optimizer, 0, STOP)
    saved = saved_by(model, optimizer, options)
    optimizer.zero_grad()  # with gradients there, torch does not make the state that it loads into
    other = make(second, model)
    if options.flatten_optimizer_state_dict:  # torch looks for every option of the class that loads
        saved = {**get_optimizer_state_dict(model, other, options=options), **saved}
    set_optimizer_state_dict(model, other, saved, options=options)
    train_either(model, other, STOP, END)
    for param, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(param), whole(wanted), rtol=1e-12, atol=1e-12)
    assert {float(state["step"]) for state in other.state.values()} == {END}
    assert float(other.param_groups[0]["lr"]) == SCHEDULE(END - 1)


@pytest.mark.parametrize("way", ["nested", "flat", "from rank 0, on the CPU"])
@pytest.mark.parametrize(("first", "second"), [("torch", "nexus"), ("nexus", "torch")])
def test_torchs_adamw_and_nexus_go_on_from_each_other(worlds: Worlds, first: str, second: str, way: str) -> None:
    chosen = {**WAYS, **FROM_RANK_0}[way]
    worlds(2).run(other_class_goes_on, first, second, chosen)
    if way in WAYS:
        other_class_goes_on(first, second, chosen)


def go_on(loaded: Path | None, saved: Path | None, start: int, stop: int, flat: bool) -> dict[str, torch.Tensor]:
    """Some steps between two checkpoints on disk."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = new_model()
    optimizer = make_optimizer(model)
    if loaded is not None:
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()  # what is not loaded is seen
        of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
        state = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(state, checkpoint_id=loaded)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
    train(model, optimizer, start, stop)
    if saved is not None:
        of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=saved)
    return snapshot(model, optimizer)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_three_processes_then_two_then_one(worlds: Worlds, tmp_path: Path, flat: bool) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    worlds(3).run(go_on, None, first, 0, 5, flat)
    worlds(2).run(go_on, first, second, 5, 10, flat)
    assert_same(go_on(second, None, 10, END, flat), uninterrupted())
