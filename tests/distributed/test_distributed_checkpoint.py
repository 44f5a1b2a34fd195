"""torch.distributed.checkpoint: each way to save an optimizer, and to go on with another number of processes."""

from __future__ import annotations

import copy
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import SCHEDULE as WITH_END
from distributed_cases import Net, make_fsdp, make_net, my_rows, whole
from distributed_cases import train as train_steps
from references import MOMENT, assert_close, same_bits
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from worlds import Worlds, in_processes

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant, Schedule

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

SCHEDULE = WSD(warmup_steps=3, stable_steps=None, decay_steps=12, peak_lr=2e-2)
STOP, DECAY, END = 8, 6, 16
DTYPE = torch.float64  # so that another order of summation does not grow


def make_optimizer(model: torch.nn.Module, lr: float | Schedule = SCHEDULE) -> FusedAdamW:
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() < 2]
    scale = 0.5 if isinstance(lr, Schedule) else 1.0
    groups = [{"params": matrices, "weight_decay": Constant(0.1)}, {"params": vectors, "lr_scale": scale}]
    return FusedAdamW(groups, lr=lr, amsgrad=True, max_grad_norm=0.7, skip_nonfinite=True)


def new_model(device: str = "cpu") -> Net:
    return make_fsdp(DTYPE, device) if dist.is_initialized() else make_net(DTYPE, device)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Steps, the decay of an open-ended schedule, and for torch's AdamW the rates that FusedAdamW computes itself."""
    rows = my_rows if isinstance(model.first.weight, DTensor) else lambda tensor: tensor
    for step in range(start, stop):
        group = optimizer.param_groups[0]
        if not isinstance(optimizer, FusedAdamW):
            group["lr"] = WITH_END(step)
        elif step == DECAY and group.get("lr_schedule") == SCHEDULE:
            optimizer.begin_decay()
        train_steps(model, optimizer, step, step + 1, rows)


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


def uninterrupted(lr: float | Schedule = SCHEDULE, device: str = "cpu") -> dict[str, Tensor]:
    model = make_net(DTYPE, device)
    optimizer = make_optimizer(model, lr)
    train(model, optimizer, 0, END)
    return snapshot(model, optimizer)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        # Gradients are added up in another order by another number of processes; 16 steps carry the roundings on.
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def state_of(model: torch.nn.Module, optimizer: FusedAdamW, options: StateDictOptions) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))


def go_on(
    loaded: Path | None,
    saved: Path | None,
    start: int,
    stop: int,
    *,
    lr: float | Schedule = SCHEDULE,
    flat: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Some steps between two checkpoints on disk. Returns what is there after them."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = new_model(device)
    optimizer = make_optimizer(model, lr)
    if loaded is not None:
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()  # what is not loaded is seen
        state = state_of(model, optimizer, options)
        dcp.load(state, checkpoint_id=loaded)
        of_model, of_optimizer = state["model"], state["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)
        for param in model.parameters():
            assert type(optimizer.state[param]["exp_avg"]) is type(param.data)
    train(model, optimizer, start, stop)
    if saved is not None:
        dcp.save(state_of(model, optimizer, options), checkpoint_id=saved)
    return snapshot(model, optimizer)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(
    ("sizes", "lr", "flat"),
    [
        ((3, 2, 1), SCHEDULE, False),
        ((3, 2, 1), SCHEDULE, True),
        ((3, 3, 2), 0.01, False),
        ((3, 1), 0.01, False),
        ((1, 2), SCHEDULE, False),
    ],
)
def test_what_some_processes_have_saved_others_go_on_with(
    worlds: Worlds, tmp_path: Path, sizes: tuple[int, ...], lr: float | Schedule, flat: bool
) -> None:
    stops = [0, 5, 10, END] if len(sizes) == 3 else [0, STOP, END]
    run = functools.partial(go_on, lr=lr, flat=flat)
    folders = [None, *(tmp_path / str(stop) for stop in stops[1:-1]), None]
    for index, size in enumerate(sizes):
        arguments = (*folders[index : index + 2], *stops[index : index + 2])
        found = worlds(size).run(run, *arguments) if size > 1 else [run(*arguments)]
    for snapshot_of_rank in found:
        assert_same(snapshot_of_rank, uninterrupted(lr))


@in_processes(2)
def test_asking_for_the_state_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    """To ask for the state makes it, and is no step."""
    model = make_fsdp(DTYPE)
    optimizer = make_optimizer(model)
    start = [param.full_tensor().clone() for param in model.parameters()]
    saved = get_optimizer_state_dict(model, optimizer)
    assert saved["param_groups"][0]["lr_schedule"]["step"] == 0
    assert {float(state["step"]) for state in saved["state"].values()} == {0.0}
    for param, before in zip(model.parameters(), start, strict=True):
        assert torch.equal(param.full_tensor(), before)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
    train(model, optimizer, 0, END)
    assert_same(snapshot(model, optimizer), uninterrupted())


@in_processes(2)
def test_a_first_step_at_rate_zero_is_a_step() -> None:
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


# Each way in which torch gathers or spreads a state dict.

WAYS: dict[str, dict[str, bool]] = {
    "nested": {},
    "nested, on the CPU": {"cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "flat, on the CPU": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
    "whole": {"full_state_dict": True},
    "from rank 0": {"full_state_dict": True, "broadcast_from_rank0": True},
    "from rank 0, on the CPU": {"full_state_dict": True, "broadcast_from_rank0": True, "cpu_offload": True},
}


def in_one_and_two(ways: Iterable[str]) -> pytest.MarkDecorator:
    cases = [(size, way) for way in ways for size in (1, 2) if size > 1 or "rank 0" not in way]
    return pytest.mark.parametrize(("size", "way"), cases)


def saved_by(model: torch.nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions) -> dict[str, Any]:
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    return {} if options.broadcast_from_rank0 and dist.get_rank() > 0 else saved


@in_one_and_two(WAYS)
@in_processes()
def test_a_run_goes_on_bit_for_bit(way: str) -> None:
    options = StateDictOptions(**WAYS[way])
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


MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "nexus": functools.partial(FusedAdamW, lr=WITH_END, weight_decay=0.1),
    "torch": functools.partial(torch.optim.AdamW, lr=1.0, weight_decay=0.1),
}


@in_one_and_two(["nested", "flat", "from rank 0, on the CPU"])
@pytest.mark.parametrize(("first", "second"), [("torch", "nexus"), ("nexus", "torch")])
@in_processes()
def test_torchs_adamw_and_nexus_go_on_from_each_other(first: str, second: str, way: str) -> None:
    options = StateDictOptions(**WAYS[way])
    expected = new_model()
    train(expected, MAKE["torch"](expected.parameters()), 0, END)
    model = new_model()
    optimizer = MAKE[first](model.parameters())
    train(model, optimizer, 0, STOP)
    saved = saved_by(model, optimizer, options)
    optimizer.zero_grad()  # with gradients there, torch does not make the state that it loads into
    other = MAKE[second](model.parameters())
    if options.flatten_optimizer_state_dict:  # torch looks for every option of the class that loads
        saved = {**get_optimizer_state_dict(model, other, options=options), **saved}
    set_optimizer_state_dict(model, other, saved, options=options)
    train(model, other, STOP, END)
    for param, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(param), whole(wanted), rtol=1e-12, atol=1e-12)
    assert {float(state["step"]) for state in other.state.values()} == {END}
    assert float(other.param_groups[0]["lr"]) == WITH_END(END - 1)


@in_processes(2)
def test_whole_state_dicts() -> None:
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
    single = make_optimizer(make_net(DTYPE))
    single.load_state_dict(saved)
    param = single.param_groups[0]["params"][0]
    assert_close(single.state[param]["exp_avg"], expected["first.weight exp_avg"], MOMENT[DTYPE])
    single.load_state_dict(optimizer.state_dict())  # gathers what is spread
    assert_close(single.state[param]["exp_avg"], expected["first.weight exp_avg"], MOMENT[DTYPE])


def of_state(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if " " in name}


@in_processes(2)
def test_the_docs_snippets_run(tmp_path: Path) -> None:
    os.chdir(tmp_path)
    page = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
    variables: dict[str, object] = {}
    with mock.patch("torch.distributed.init_process_group"):  # which has been done here
        for code in re.findall(r"^```py\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
            exec(code, variables)
    assert (tmp_path / "checkpoint" / "step-00000001" / ".metadata").is_file()
