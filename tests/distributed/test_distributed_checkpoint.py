"""torch.distributed.checkpoint: what is saved by one number of processes goes on in another."""

from __future__ import annotations

import copy
import os
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import Net, batch, loss_of, make_fsdp, my_rows, whole
from references import MOMENT, assert_close
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from worlds import Worlds

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant, Schedule

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
]

SCHEDULE = WSD(warmup_steps=3, stable_steps=None, decay_steps=12, peak_lr=2e-2)
STOP, DECAY, END = 8, 6, 16
DTYPE = torch.float64  # so that another order of summation does not grow


def make_optimizer(model: torch.nn.Module, lr: float | Schedule = SCHEDULE) -> FusedAdamW:
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() < 2]
    scale = 0.5 if isinstance(lr, Schedule) else 1.0
    groups = [{"params": matrices, "weight_decay": Constant(0.1)}, {"params": vectors, "lr_scale": scale}]
    return FusedAdamW(groups, lr=lr, amsgrad=True, max_grad_norm=0.7, skip_nonfinite=True)


def alone() -> Net:
    torch.manual_seed(1)
    return Net().to(DTYPE)


def train(model: torch.nn.Module, optimizer: FusedAdamW, start: int, stop: int) -> None:
    device = next(model.parameters()).device.type
    for step in range(start, stop):
        if step == DECAY and isinstance(optimizer.param_groups[0].get("lr_schedule"), WSD):
            optimizer.begin_decay()
        optimizer.zero_grad()
        rows = my_rows if isinstance(model.first.weight, DTensor) else (lambda tensor: tensor)
        loss_of(model, *map(rows, batch(step, DTYPE, device))).backward()
        optimizer.step()


def snapshot(model: torch.nn.Module, optimizer: FusedAdamW) -> dict[str, Tensor]:
    """Whole tensors, by name: of every process the same."""
    found: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        found[name] = whole(param).detach().clone()
        for key, value in optimizer.state[param].items():
            found[f"{name} {key}"] = whole(value).clone()
    for index, group in enumerate(optimizer.param_groups):
        found[f"lr {index}"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else torch.tensor(group["lr"])
    return found


def uninterrupted(lr: float | Schedule = SCHEDULE, end: int = END, device: str = "cpu") -> dict[str, Tensor]:
    model = alone().to(device)
    optimizer = make_optimizer(model, lr)
    train(model, optimizer, 0, end)
    return snapshot(model, optimizer)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        # Gradients are added up in another order by another number of processes; 16 steps carry the roundings on.
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def save(folder: Path, lr: float | Schedule, device: str = "cpu") -> None:
    model = make_fsdp(DTYPE, device)
    optimizer = make_optimizer(model, lr)
    train(model, optimizer, 0, STOP)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(model: torch.nn.Module, optimizer: FusedAdamW, folder: Path) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def resume(folder: Path, lr: float | Schedule, device: str = "cpu") -> None:
    model = make_fsdp(DTYPE, device)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()  # what is not loaded is seen
    optimizer = make_optimizer(model, lr)
    load(model, optimizer, folder)
    assert all(isinstance(optimizer.state[param]["exp_avg"], DTensor) for param in model.parameters())
    train(model, optimizer, STOP, END)
    assert_same(snapshot(model, optimizer), uninterrupted(lr, device=device))


@pytest.mark.parametrize("lr", [SCHEDULE, 0.01], ids=["schedule", "float"])
def test_saved_by_three_processes_goes_on_in_two_in_one_and_in_three(
    worlds: Worlds, tmp_path: Path, lr: float | Schedule
) -> None:
    worlds(3).run(save, tmp_path, lr)
    for size in (2, 3):
        worlds(size).run(resume, tmp_path, lr)
    model = alone()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = make_optimizer(model, lr)
    load(model, optimizer, tmp_path)
    train(model, optimizer, STOP, END)
    assert_same(snapshot(model, optimizer), uninterrupted(lr))


def save_alone(folder: Path) -> None:
    model = alone()
    optimizer = make_optimizer(model)
    train(model, optimizer, 0, STOP)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def test_saved_by_one_process_goes_on_in_two(worlds: Worlds, tmp_path: Path) -> None:
    save_alone(tmp_path)
    worlds(2).run(resume, tmp_path, SCHEDULE)


def before_the_first_step(folder: Path) -> None:
    """To ask for the state makes it, and is no step."""
    model = make_fsdp(DTYPE)
    optimizer = make_optimizer(model)
    start = [param.full_tensor().clone() for param in model.parameters()]
    saved = get_optimizer_state_dict(model, optimizer)
    assert saved["param_groups"][0]["lr_schedule"]["step"] == 0
    assert {float(state["step"]) for state in saved["state"].values()} == {0.0}
    for param, before in zip(model.parameters(), start, strict=True):
        assert torch.equal(param.full_tensor(), before)
    dcp.save({"optimizer": saved}, checkpoint_id=folder)
    train(model, optimizer, 0, END)
    assert_same(snapshot(model, optimizer), uninterrupted())


def test_asking_for_the_state_before_the_first_step_changes_nothing(worlds: Worlds, tmp_path: Path) -> None:
    worlds(2).run(before_the_first_step, tmp_path)


def a_first_step_at_rate_zero_counts() -> None:
    """Also over gradients of zeros, and where rank 1 has not imported what asks for the state, which rank 0 has."""
    model = make_fsdp(DTYPE)
    optimizer = FusedAdamW(model.parameters(), lr=0.0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with mock.patch.dict(sys.modules):
        if dist.get_rank() == 1:
            del sys.modules["torch.distributed.checkpoint.state_dict"]
        optimizer.step()
    assert {int(optimizer.state[param]["step"]) for param in model.parameters()} == {1}


def test_a_first_step_at_rate_zero_is_a_step(worlds: Worlds) -> None:
    worlds(2).run(a_first_step_at_rate_zero_counts)


def whole_states() -> None:
    """Gathered, as one process would have them, and back."""
    model = make_fsdp(DTYPE)
    optimizer = make_optimizer(model)
    train(model, optimizer, 0, STOP)
    every = StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=every))
    assert not any(isinstance(value, DTensor) for state in saved["state"].values() for value in state.values())
    expected = of_state(snapshot(model, optimizer))
    train(model, optimizer, STOP, STOP + 2)
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(saved), options=every)
    assert_same(of_state(snapshot(model, optimizer)), expected)
    train(model, optimizer, STOP, STOP + 2)
    optimizer.load_state_dict(saved)  # whole tensors, of which each process takes its part
    assert_same(of_state(snapshot(model, optimizer)), expected)
    single = make_optimizer(alone())
    single.load_state_dict(saved)
    param = single.param_groups[0]["params"][0]
    assert_close(single.state[param]["exp_avg"], expected["first.weight exp_avg"], MOMENT[DTYPE])
    single.load_state_dict(optimizer.state_dict())  # gathers what is spread
    assert_close(single.state[param]["exp_avg"], expected["first.weight exp_avg"], MOMENT[DTYPE])


def of_state(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if " " in name}


def test_whole_state_dicts(worlds: Worlds) -> None:
    worlds(2).run(whole_states)


DOCS = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"


def what_the_docs_show(folder: Path) -> None:
    os.chdir(folder)
    variables: dict[str, object] = {}
    for code in re.findall(r"^```py\n(.*?)^```$", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        exec(code, variables)


def test_the_docs_snippets_run(worlds: Worlds, tmp_path: Path) -> None:
    worlds(2).run(what_the_docs_show, tmp_path)
    assert (tmp_path / "checkpoint" / "step-00000001" / ".metadata").is_file()
