"""Edits, plateaus, averages and clocks beside each other: what one must not do to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_worlds import World
from cuda_on_cpu import NAME
from graphs_on_cpu import Graphs
from references import same_bits
from torch import Tensor

from nexus.optim import EMA, FusedAdamW, Mean
from nexus.schedules import Clock, Constant, Exponential, Linear, ReduceOnPlateau, Schedule
from nexus.training import find_lr


def made(count: int = 1, **options: Any) -> tuple[list[torch.nn.Parameter], FusedAdamW]:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(count)]
    return params, FusedAdamW([{"params": [param]} for param in params], **options)


def steps(optimizer: FusedAdamW, count: int = 1) -> None:
    for _ in range(count):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, 0.5)
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beta1", {"betas": (Constant(0.5), 0.999)}),
        ("average_decay", {"average": EMA(Constant(0.5))}),
        ("weight_decay", {"weight_decay": Constant(0.5)}),
    ],
)
def test_an_edit_of_the_rate_changes_nothing_else(name: str, options: dict[str, Any]) -> None:
    _, optimizer = made(lr=Constant(0.5), **options)
    steps(optimizer)
    with pytest.raises(
        RuntimeError, match=rf"group 0 has Constant.* as {name}, too, which an edit of the rate would"
    ):
        optimizer.replace(Constant(2.0))
    assert optimizer.schedules == [Constant(0.5)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "again",
    [
        Linear(start_lr=1.0, end_lr=0.0, total_steps=10),
        ReduceOnPlateau(Linear(start_lr=1.0, end_lr=0.0, total_steps=10), patience=0),
    ],
)
def test_an_equal_schedule_that_all_groups_are_given_begins_anew(count: int, again: Schedule) -> None:
    _, optimizer = made(count, lr=again)
    steps(optimizer, 2)
    optimizer.hold()
    if isinstance(again, ReduceOnPlateau):
        optimizer.report(1.0)
        optimizer.report(2.0)
    for group in optimizer.param_groups:
        group["lr"] = again
    steps(optimizer)
    assert [group["lr"].item() for group in optimizer.param_groups] == [pytest.approx(0.8)] * count


@pytest.mark.parametrize(
    "decay", [Exponential(peak_lr=0.9, gamma=1.01), Schedule.from_function(lambda t: 1.5 if t == 5 else 0.9, 10)]
)
def test_a_decay_that_leaves_its_bounds_is_refused(decay: Schedule) -> None:
    with pytest.raises(ValueError, match="decay must be a Schedule of values from 0 to 1, got"):
        EMA(decay)


@pytest.mark.parametrize("convert", [lambda m: m.bfloat16(), lambda m: m.double()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_converted_while_averages_are_shown_has_its_weights_again(
    convert: Callable[[torch.nn.Module], Any], dtype: torch.dtype
) -> None:
    model = torch.nn.Linear(96, 96)
    optimizer = FusedAdamW(model.parameters(), lr=0.1, average=EMA(0.9, dtype=dtype))
    steps(optimizer, 3)
    before = [param.detach().clone() for param in model.parameters()]
    with optimizer.averaged():
        convert(model)
        model.float()
    for param, weight in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, weight)


def test_means_of_several_beginnings_are_no_averaged_model() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(first, second)
    groups = [{"params": each.parameters(), "average": Mean(start)} for start, each in ((1, first), (4, second))]
    optimizer = FusedAdamW(groups, lr=0.1)
    steps(optimizer, 6)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with pytest.raises(ValueError, match=r"means from several updates on, \[1, 4\], and an AveragedModel has one"):
        optimizer.store_average(model, averaged)


@pytest.mark.parametrize("captured", [False, True])
def test_another_decay_of_an_average_reaches_a_captured_step(graphs: Graphs, captured: bool) -> None:
    worlds = [World(NAME, each, lr=1e-2, average=EMA(0.9)) for each in (captured, False)]
    for world in worlds:

        def train_step(x: Tensor, y: Tensor, world: World = world) -> Tensor:
            world.optimizer.zero_grad()
            loss = world.loss(x, y)
            loss.backward()
            world.optimizer.step()
            return loss

        step = world.step(train_step)
        torch.manual_seed(3)
        for index in range(12):
            if index == 8:
                world.optimizer.param_groups[0]["average"] = EMA(0.5)
            step(*world.batch(index))
    assert same_bits(worlds[0].state(), worlds[1].state())
    averages = [[state["average"] for state in world.optimizer.state.values()] for world in worlds]
    assert same_bits(*averages)
    assert graphs.events.count("capture") == captured


def test_what_only_other_settings_have_is_there_before_the_first_step() -> None:
    clock = Clock()
    _, optimizer = made(
        lr=0.1,
        betas=(0.9, Linear(start_lr=0.9, end_lr=0.99, total_steps=100).at(clock)),
        eps=ReduceOnPlateau(Constant(1e-8)),
    )
    optimizer.advance(clock, 5)
    optimizer.report(1.0)
    assert clock.count == 5


def test_a_limit_of_the_norm_may_be_infinite_as_a_tensor() -> None:
    _, optimizer = made(lr=0.1, max_grad_norm=torch.tensor(float("inf")))
    steps(optimizer)
    assert optimizer.grad_norm == 1.0


class Endless(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        while True:
            yield torch.ones(4)


def test_a_range_test_takes_a_loader_without_a_length() -> None:
    (param,), optimizer = made(lr=0.1)

    def train_step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (param * batch).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    found = find_lr(train_step, optimizer, torch.utils.data.DataLoader(Endless()), high=1e-2, steps=10)
    assert len(found.losses) == 10


def test_a_beta_that_reaches_1_between_the_ends_of_its_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match="betas"):
        made(
            lr=0.1,
            betas=(
                0.9,
                Linear(start_lr=0.0, end_lr=2.0, total_steps=10) * Linear(start_lr=2.0, end_lr=0.0, total_steps=10),
            ),
        )


def test_a_scheduler_that_graphs_cannot_follow_is_not_taken_over(graphs: Graphs) -> None:
    world = World(NAME, True, lr=torch.tensor(0.01, dtype=torch.float64))

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        world.optimizer.zero_grad()
        loss = world.loss(x, y)
        loss.backward()
        world.optimizer.step()
        return loss

    step = world.step(train_step)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(world.optimizer, max_lr=0.1, total_steps=100)
    for index in range(6):
        step(*world.batch(index))
    assert graphs.events.count("capture") == 1
    before = [dict(group) for group in world.optimizer.param_groups]
    with pytest.raises(RuntimeError, match="betas or bias_correction were changed"):
        world.optimizer.take_over(scheduler)
    for now, then in zip(world.optimizer.param_groups, before, strict=True):
        assert all(now[key] is then[key] for key in then)
    step(*world.batch(6))


def test_another_form_of_the_bias_correction_is_said_at_a_load() -> None:
    betas = (0.9, Linear(start_lr=0.9, end_lr=0.99, total_steps=10))
    _, saved = made(lr=0.1, betas=betas, bias_correction="power")
    _, optimizer = made(lr=0.1, betas=betas)
    steps(saved)
    with pytest.warns(
        UserWarning, match="group 0 was saved with bias_correction='power', and goes on with 'product'"
    ):
        optimizer.load_state_dict(saved.state_dict())


def test_a_rise_to_the_highest_rate_of_what_grows_without_end_is_refused() -> None:
    _, optimizer = made(lr=Exponential(peak_lr=0.1, gamma=1.1))
    steps(optimizer)
    with pytest.raises(ValueError, match=r"grows without end, and has no highest rate: give rewarm\(to=\.\.\.\)"):
        optimizer.rewarm(5)
    assert optimizer.schedule == Exponential(peak_lr=0.1, gamma=1.1)
    optimizer.rewarm(5, to=1.0)
    steps(optimizer, 6)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_only_averages_that_a_group_still_keeps_are_shown() -> None:
    (first, second), optimizer = made(2, lr=0.1, average=EMA(0.5))
    steps(optimizer, 3)
    optimizer.param_groups[1]["average"] = None
    before = first.detach().clone(), second.detach().clone()
    with optimizer.averaged():
        assert not torch.equal(first, before[0])
        assert torch.equal(second, before[1])
