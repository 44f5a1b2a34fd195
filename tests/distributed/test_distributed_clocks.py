"""Clocks of models that are spread over processes: what each has counted is added up, eagerly and in graphs."""

from __future__ import annotations

import contextlib
import importlib
import math

import pytest
import torch
import torch.distributed as dist
from distributed_cases import batch, loss_of, make_fsdp, my_rows, same_on_all_ranks, whole
from references import same_bits
from torch import Tensor
from worlds import in_processes

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Clock
from nexus.training import capture_train_step, find_lr

BY_TOKENS = WSD(warmup_steps=50, stable_steps=400, decay_steps=500, peak_lr=2e-2)
STEPS, BAD = 10, 6


def train(backend: str, captures: bool) -> list[Tensor]:
    """All that a run ends with; a rank's batch at step t has 10 t + its rank tokens."""
    model, clock = make_fsdp(), Clock()
    optimizer = FusedAdamW(model.parameters(), lr=BY_TOKENS.at(clock), skip_nonfinite=True, backend=backend)

    def train_step(x: Tensor, y: Tensor, tokens: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.advance(clock, tokens, process_group=dist.group.WORLD)
        return loss.detach()

    captured = capture_train_step(train_step, optimizer)
    count, ranks = 0, dist.get_world_size()
    for index in range(STEPS):
        x, y = map(my_rows, batch(index))
        if index == BAD and dist.get_rank() == 0:
            y = y * math.nan
        tokens = torch.tensor(10 * index + dist.get_rank())
        # The first ones are not captured: what FSDP2 makes in its first step is then there, and freed.
        (captured if captures and index > 2 else train_step)(x, y, tokens)
        if index != BAD:
            assert float(optimizer.param_groups[0]["lr"]) == BY_TOKENS(count)
            count += ranks * 10 * index + sum(range(ranks))
        assert int(tokens) == 10 * index + dist.get_rank()  # a copy was added up
        assert clock.count == count
    assert captured.graph_count == captures
    ends = [whole(param).detach().clone() for param in model.parameters()]
    assert same_on_all_ranks(*ends)
    return ends


@pytest.mark.parametrize("captures", [False, True], ids=["eager", "captured"])
@in_processes(2)
def test_the_tokens_of_all_processes_are_counted(captures: bool) -> None:
    context = importlib.import_module("distributed_graphs").graphs() if captures else contextlib.nullcontext()
    with context:
        ends = train("cuda on cpu", captures)
    if captures:
        assert same_bits(ends, train("cuda on cpu", False))


@in_processes(2)
def test_a_number_is_added_up_only_where_asked() -> None:
    clock = Clock()
    optimizer = FusedAdamW(make_fsdp().parameters(), lr=BY_TOKENS.at(clock))
    optimizer.advance(clock, 5)
    assert clock.count == 5
    optimizer.advance(clock, 1 + dist.get_rank(), process_group=dist.group.WORLD)
    assert clock.count == 5 + sum(range(1, 1 + dist.get_world_size()))


@in_processes(2)
def test_a_range_test_is_the_same_in_every_process_and_leaves_no_trace() -> None:
    def run(interrupts: bool) -> list[Tensor]:
        model = make_fsdp()
        optimizer = FusedAdamW(model.parameters(), lr=BY_TOKENS, max_grad_norm=1.0, backend="cuda on cpu")

        def train_step(index: int) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, *map(my_rows, batch(index)))
            loss.backward()
            optimizer.step()
            return loss

        for index in range(6):
            train_step(index)
            if interrupts and index in (0, 4):
                # It diverges: all processes stop at once, by the mean of their losses.
                found = find_lr(train_step, optimizer, range(40), low=1e-3, high=1e4, steps=40, model=model)
                assert len(found.losses) < 40
                everyone: list[object] = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, found)
                assert everyone == [found] * len(everyone)
        states = [value for param in model.parameters() for value in optimizer.state[param].values()]
        return [whole(each).detach().clone() for each in (*model.parameters(), *states)]

    assert same_bits(run(True), run(False))
