"""Schedules at a clock of the user's: tokens, samples, anything that is counted."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_worlds import World
from clock_cases import BY_TOKENS, BY_UPDATES, DECAY, NoWaiting, train_by_tokens
from cuda_on_cpu import NAME
from graphs_on_cpu import Graphs
from references import make_grads, make_params, params_of, same_bits, set_grads, snapshot, through_a_file
from side_by_side import train
from torch import Tensor

from nexus.backends.interface import StepState
from nexus.optim import FusedAdamW
from nexus.optim.clocks import Clocks
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Clock, Constant, Cosine, Linear, Schedule, evaluate, join, minimum
from nexus.training import step_in_backward
from nexus.training.schedulers import ScheduleLR

LINE = Linear(start_lr=0.0, end_lr=1.0, total_steps=1000)


def make(clock: Clock, backend: str = "auto", **options: Any) -> FusedAdamW:
    torch.manual_seed(0)
    return FusedAdamW(make_params([(5,), (3, 2)]), backend=backend, **{"lr": LINE.at(clock), **options})


def rate(optimizer: FusedAdamW) -> float:
    return float(optimizer.param_groups[0]["lr"])


# What the step reads.


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_rates_follow_the_clock(backend: str, tensors: bool) -> None:
    train_by_tokens(backend, tensors)


def test_a_clock_advances_for_updates_to_come(backend: str) -> None:
    clock = Clock()
    optimizer = make(clock, backend)
    assert (clock.count, rate(optimizer)) == (0, 0.0)
    optimizer.advance(clock, 250)
    train(optimizer, 1)
    assert rate(optimizer) == 0.25
    for n in (50, torch.tensor(200, dtype=torch.uint8), 0):  # any number of times between two updates
        optimizer.advance(clock, n)
    train(optimizer, 2)
    assert (clock.count, rate(optimizer)) == (500, 0.5)


def test_a_schedule_may_come_to_a_clock_in_mid_run(backend: str) -> None:
    clock = Clock()
    optimizer = make(clock, backend, lr=0.5)
    train(optimizer, 3)
    optimizer.param_groups[0]["lr"] = LINE.at(clock)
    optimizer.advance(clock, 750)
    train(optimizer, 1)
    assert rate(optimizer) == 0.75
    optimizer.param_groups[0]["lr"] = (0.5 * LINE).at(clock)  # at the same clock, which has its count
    train(optimizer, 1)
    assert rate(optimizer) == 0.375
    optimizer.param_groups[0]["lr"] = Linear(start_lr=0.0, end_lr=1.0, total_steps=10)
    train(optimizer, 1)
    assert (clock.count, rate(optimizer)) == (750, 0.5)


def test_equal_schedules_at_two_clocks_are_two(backend: str) -> None:
    first, second = Clock(), Clock()
    groups = [{"params": make_params([(2,)]), "lr": LINE.at(clock)} for clock in (first, second)]
    optimizer = FusedAdamW(groups, backend=backend)
    optimizer.advance(first, 100)
    optimizer.advance(second, 300)
    train(optimizer, 1)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.1, 0.3]


# Skipped steps.


def bad_step(optimizer: FusedAdamW) -> None:
    params = params_of(optimizer)
    set_grads(params, [grad * math.nan for grad in make_grads(params)])
    optimizer.step()


def test_a_skipped_step_does_not_advance_the_clock(backend: str) -> None:
    clock = Clock()
    optimizer = make(clock, backend, skip_nonfinite=True)
    counts = []
    for is_bad in (False, True, True, False, True):
        bad_step(optimizer) if is_bad else train(optimizer, 1)
        with NoWaiting():
            optimizer.advance(clock, 10)
            optimizer.advance(clock, torch.tensor(1))
        counts.append(clock.count)
    assert counts == [11, 11, 11, 22, 22]
    bad_step(optimizer)
    train(optimizer, 1)
    bad_step(optimizer)
    optimizer.advance(clock, 30)  # of several steps, one was made
    assert clock.count == 52


def test_a_step_that_a_grad_scaler_skips_does_not_either(backend: str) -> None:
    clock = Clock()
    optimizer = make(clock, backend)
    params = params_of(optimizer)
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=4.0)
    for index, factor in enumerate((1.0, math.inf, 1.0)):
        scaler.scale(torch.zeros((), device=params[0].device))  # which it wants to have seen
        set_grads(params, [torch.ones_like(param) * factor for param in params])
        scaler.step(optimizer)
        scaler.update()
        optimizer.advance(clock, 100)
        assert clock.count == (100, 100, 200)[index]


# Captured.


class ByTokens(World):
    def __init__(self, captured: bool, moves: Callable[[Tensor], Any]) -> None:
        self.clock = Clock()
        options = {"lr": BY_TOKENS.at(self.clock), "weight_decay": DECAY.at(self.clock), "skip_nonfinite": True}
        super().__init__(NAME, captured, **options)
        self.optimizer: FusedAdamW
        self.extra = [lambda: torch.tensor(self.clock.count)]

        def train_step(x: Tensor, y: Tensor, tokens: Tensor) -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(x, y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.advance(self.clock, moves(tokens))
            return loss

        self.train_step = self.step(train_step)

    def run(self, steps: range) -> list[list[Tensor]]:
        torch.manual_seed(steps.start)  # of the dropout
        states = []
        for index in steps:
            x, y = self.batch(index)
            y = y * math.nan if index in (7, 8) else y
            self.train_step(x, y, torch.tensor(100 * index))
            states.append(self.state())
        return states


@pytest.mark.parametrize("moves", [lambda tokens: tokens, lambda tokens: 300], ids=["a tensor", "a number"])
def test_a_captured_step_moves_the_clock_at_each_replay(graphs: Graphs, moves: Callable[[Tensor], Any]) -> None:
    eager, captured = (ByTokens(is_captured, moves) for is_captured in (False, True))
    for ours, expected in zip(captured.run(range(14)), eager.run(range(14)), strict=True):
        assert same_bits(ours, expected)
    assert graphs.events.count("replay") == 11
    assert captured.clock.count == (7600 if moves(torch.tensor(5)) == 5 else 3600)


def test_a_graph_goes_on_with_the_clock_of_a_checkpoint(graphs: Graphs) -> None:
    captured, other = (ByTokens(is_captured, lambda tokens: tokens) for is_captured in (True, False))
    captured.run(range(5))
    saved = [copy.deepcopy(each.state_dict()) for each in (captured.model, captured.optimizer)]
    captured.run(range(5, 7))
    for each in (captured, other):
        each.model.load_state_dict(saved[0])
        each.optimizer.load_state_dict(saved[1])
        assert each.clock.count == 1000
    assert same_bits(captured.run(range(9, 13))[-1], other.run(range(9, 13))[-1])
    assert graphs.events.count("capture") == 1


# Saved and loaded.


def run_by_tokens(optimizer: FusedAdamW, clock: Clock, steps: range) -> None:
    for t in steps:
        torch.manual_seed(t)
        train(optimizer, 1)
        optimizer.advance(clock, 37 * t)


def test_a_resumed_run_ends_with_the_same_bits(backend: str) -> None:
    def mixed(clock: Clock) -> FusedAdamW:
        torch.manual_seed(1)
        groups = [
            {"params": make_params([(5,)]), "lr": BY_TOKENS.at(clock)},
            {"params": make_params([(4,)]), "lr": BY_UPDATES, "weight_decay": DECAY.at(clock)},
        ]
        return FusedAdamW(groups, backend=backend)

    clocks = Clock(), Clock()
    whole, resumed = map(mixed, clocks)
    run_by_tokens(whole, clocks[0], range(14))
    first = mixed(clock := Clock())
    run_by_tokens(first, clock, range(8))
    saved = through_a_file(first.state_dict())
    assert saved["param_groups"][0]["lr_schedule"]["step"] == clock.count == 37 * 28
    assert saved["param_groups"][1]["lr_schedule"]["step"] == 8
    with torch.no_grad():
        for ours, theirs in zip(params_of(resumed), params_of(first), strict=True):
            ours.copy_(theirs)
    resumed.load_state_dict(saved)
    assert clocks[1].count == 37 * 28
    run_by_tokens(resumed, clocks[1], range(8, 14))
    assert same_bits(snapshot(resumed), snapshot(whole))
    assert clocks[0].count == clocks[1].count
    assert int(engine_of(resumed).state_on(torch.device(resumed.param_groups[0]["lr"].device)).completed) == 14


def test_the_count_of_a_clock_is_no_count_of_updates() -> None:
    clock = Clock()
    optimizer = make(clock, weight_decay=Linear(start_lr=0.0, end_lr=1.0, total_steps=10))
    train(optimizer, 2)
    optimizer.advance(clock, 10**6)
    saved = optimizer.state_dict()
    other = make(Clock(), weight_decay=Linear(start_lr=0.0, end_lr=1.0, total_steps=10))
    other.load_state_dict(saved)
    train(other, 1)
    assert float(other.param_groups[0]["weight_decay"]) == 0.2
    torchs = torch.optim.AdamW(make_params([(5,), (3, 2)]))
    torchs.load_state_dict(saved)
    assert torchs.param_groups[0]["lr"] == rate(optimizer)


def test_a_checkpoint_without_the_count_is_said_to_have_none() -> None:
    clock = Clock()
    plain, optimizer = make(clock, lr=LINE), make(clock)
    train(plain, 3)
    optimizer.advance(clock, 40)
    missing = r"no count of the clock of param_groups\[0\]\['lr_schedule'\], which stays at 40"
    other = "lr_schedule.type was 'Linear' in the checkpoint and is 'Clocked' now"
    with pytest.warns(UserWarning, match=other), pytest.warns(UserWarning, match=missing) as warned:
        optimizer.load_state_dict(plain.state_dict())
    assert all(each.filename == __file__ for each in warned)
    assert clock.count == 40
    with pytest.warns(UserWarning, match="lr_schedule.type was 'Clocked'"):
        plain.load_state_dict(optimizer.state_dict())
    train(plain, 1)
    assert rate(plain) == LINE(3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_has_clocks_of_its_own(backend: str, copied: Callable[[FusedAdamW], FusedAdamW]) -> None:
    clock = Clock()
    optimizer = make(clock, backend)
    optimizer.advance(clock, 300)
    train(optimizer, 1)
    other = copied(optimizer)
    own = other.param_groups[0]["lr_schedule"].clock
    assert own is not clock
    optimizer.advance(clock, 100)
    other.advance(own, 500)
    with pytest.raises(ValueError, match=r"no schedule of this optimizer is at this clock: give it lr=schedule.at"):
        other.advance(clock, 1)
    for each in (optimizer, other):
        train(each, 1)
    assert (clock.count, rate(optimizer), own.count, rate(other)) == (400, 0.4, 800, 0.8)


def test_a_clock_outlives_its_optimizer() -> None:
    clock = Clock()
    optimizer = make(clock)
    optimizer.advance(clock, 3)
    del optimizer
    gc.collect()
    assert clock.count == 0
    optimizer = make(clock)
    optimizer.advance(clock, 5)
    assert clock.count == 5


def test_each_device_has_the_count_and_a_device_that_is_left_is_forgotten() -> None:
    old, new = (StepState(torch.device(name), skip_nonfinite=True, seed=0) for name in ("cpu", "cpu:0"))
    clock, clocks = Clock(), Clocks()
    clocks.on(clock, old).advance(5, old)
    for state in (old, new):
        state.skipped.add_(1)
    for state in (old, new):  # the new one knows, too, that the last step was skipped
        clocks.on(clock, state).advance(7, state)
        assert clock.count == int(clocks.on(clock, state).count) == 5
    for state in (old, new):
        state.completed.add_(1)
        clocks.on(clock, state).advance(7, state)
    assert [int(each.count) for each in clocks.every()] == [12, 12]
    clocks.keep([new.device])
    clocks.on(clock, new).advance(1, new)
    assert clock.count == 13
    assert int(clocks.on(clock, old).count) == 13


# Edits, by the clock's count.


def test_a_decay_begins_at_the_count_of_tokens(backend: str) -> None:
    clock = Clock()
    schedule = WSD(warmup_steps=100, stable_steps=None, decay_steps=1000, peak_lr=1.0)
    optimizer = make(clock, backend, lr=schedule.at(clock))
    train(optimizer, 1)
    optimizer.advance(clock, 5000)
    with NoWaiting():
        optimizer.begin_decay()
    optimizer.advance(clock, 250)
    train(optimizer, 1)
    assert rate(optimizer) == 0.75
    saved = through_a_file(optimizer.state_dict())
    resumed = make(other := Clock(), backend, lr=schedule.at(other))
    resumed.load_state_dict(saved)
    resumed.advance(other, 250)
    train(resumed, 1)
    assert (other.count, rate(resumed)) == (5500, 0.5)


def test_a_stable_phase_is_extended_by_tokens() -> None:
    clock = Clock()
    optimizer = make(clock, lr=WSD(warmup_steps=100, stable_steps=400, decay_steps=1000, peak_lr=1.0).at(clock))
    optimizer.extend_stable(500)
    optimizer.advance(clock, 1500)
    train(optimizer, 1)
    assert rate(optimizer) == 0.5


def test_steps_in_the_backward_pass_read_the_clock() -> None:
    def run(in_backward: bool) -> list[Tensor]:
        torch.manual_seed(2)
        model, clock = torch.nn.Linear(4, 3), Clock()
        optimizer = FusedAdamW(model.parameters(), lr=LINE.at(clock))
        handle = step_in_backward(model, optimizer) if in_backward else None
        for index in range(5):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.advance(clock, 100 * index)
        assert (clock.count, rate(optimizer)) == (1000, 0.6)
        assert handle is None or model.weight.grad is None
        return snapshot(optimizer)

    assert same_bits(run(True), run(False))


# As a value.


def test_a_schedule_at_a_clock_is_a_value() -> None:
    clock, other = Clock(), Clock()
    clocked = BY_TOKENS.at(clock)
    assert clocked == BY_TOKENS.at(clock)
    assert hash(clocked) == hash(BY_TOKENS.at(clock))
    assert clocked not in (BY_TOKENS.at(other), BY_TOKENS, DECAY.at(clock))
    assert clocked.values(0, 5) == BY_TOKENS.values(0, 5)
    assert (clocked.phase(0), clocked.length) == ("warmup", BY_TOKENS.length)
    assert 0.5 * clocked == (0.5 * BY_TOKENS).at(clock)
    assert repr(LINE.at(clock)) == f"({LINE!r}).at(Clock())"
    restored = Schedule.from_dict(clocked.to_dict())
    assert restored.to_dict() == clocked.to_dict() == {"type": "Clocked", "schedule": BY_TOKENS.to_dict()}
    assert restored != clocked  # its clock is new
    steps = torch.tensor([0, 3, 10**6])
    assert torch.equal(evaluate(clocked, steps), evaluate(BY_TOKENS, steps))


@pytest.mark.parametrize(
    "compose",
    [
        lambda s: s + Constant(1.0),
        lambda s: Constant(1.0) * s,
        lambda s: join([Constant(1.0), s], [3]),
        lambda s: minimum(s, Constant(1.0)),
        lambda s: s.warmup(3),
        lambda s: s.repeat(2),
        lambda s: s.cooldown(2),
        lambda s: s.clip(0.1),
    ],
)
def test_what_is_at_a_clock_is_part_of_no_other(compose: Callable[[Schedule], Schedule]) -> None:
    with pytest.raises(TypeError, match=r"must be at no clock, got .*; put the whole at its clock: \(\.\.\.\)\.at"):
        compose(LINE.at(Clock()))


# Bad input.


@pytest.mark.parametrize(
    ("n", "error", "words"),
    [
        (-1, ValueError, "n must be an int from 0 to 2\\*\\*53 or a 0-dim tensor of integers on the device, got -1"),
        (1.5, TypeError, "n must be an int from 0"),
        (True, TypeError, "n must be an int from 0"),
        (None, TypeError, "n must be an int from 0"),
        (2**53 + 1, ValueError, "n must be an int from 0"),
        (torch.tensor(1.0), TypeError, "0-dim tensor of integers, got a tensor of the shape .* of torch.float32"),
        (torch.tensor(True), TypeError, "got a tensor of the shape .* of torch.bool"),
        (torch.tensor([1]), TypeError, r"got a tensor of the shape \(1,\) of torch.int64; tensor.sum\(\) adds"),
    ],
)
def test_what_is_no_count_changes_nothing(n: Any, error: type[Exception], words: str) -> None:
    clock = Clock()
    optimizer = make(clock)
    optimizer.advance(clock, 4)
    with pytest.raises(error, match=words):
        optimizer.advance(clock, n)
    assert clock.count == 4


def test_a_clock_never_runs_backwards_nor_beyond_what_schedules_take() -> None:
    clock = Clock()
    optimizer = make(clock)
    optimizer.advance(clock, 4)
    optimizer.advance(clock, torch.tensor(-3))
    assert clock.count == 4
    for n in (2**53, torch.tensor(2**63 - 1), torch.tensor(2**62)):
        optimizer.advance(clock, n)
        assert clock.count == 2**53


def test_only_a_clock_of_this_optimizer_is_advanced() -> None:
    optimizer = make(Clock())
    with pytest.raises(ValueError, match="no schedule of this optimizer is at this clock"):
        optimizer.advance(Clock(), 1)
    with pytest.raises(TypeError, match=r"clock must be a nexus.schedules.Clock, got Linear\("):
        optimizer.advance(LINE, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"clock must be a nexus.schedules.Clock, got 3 \(int\); Clock\(\) makes one"):
        LINE.at(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a nexus Schedule that is at no clock yet"):
        LINE.at(Clock()).at(Clock())


def test_a_scheduler_takes_no_schedule_at_a_clock() -> None:
    optimizer = torch.optim.SGD(make_params([(2,)]), lr=1.0)
    with pytest.raises(TypeError, match=r"a scheduler counts its own steps, got .*; give it to FusedAdamW as lr"):
        ScheduleLR(optimizer, Cosine(peak_lr=1.0, total_steps=10).at(Clock()))


def test_a_clock_that_was_never_moved_is_warned_of() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = FusedAdamW(
        [weight], lr=WSD(warmup_steps=5, stable_steps=None, decay_steps=5, peak_lr=1.0).at(Clock())
    )
    weight.grad = torch.ones(2)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"at a clock that stands at 0 after 1 updates: call optimizer\.advance"):
        optimizer.state_dict()
