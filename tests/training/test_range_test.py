"""`find_lr`: the sweep is what it says, the suggestion where the loss falls, and afterwards nothing has happened."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_worlds import World
from cuda_on_cpu import NAME
from graphs_on_cpu import Graphs
from references import make_params, same_bits, snapshot
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Clock, Constant, Exponential, Linear
from nexus.training import RangeTest, find_lr, step_in_backward
from nexus.training.range_test import _smoothed, _suggested
from nexus.training.schedulers import WSDScheduler

STEPS = 12
BY_TOKENS = WSD(warmup_steps=100, stable_steps=None, decay_steps=500, peak_lr=1e-2)


class Run(World):
    """A training run that a range test interrupts. Its rate is by tokens; it draws random numbers of all kinds."""

    def __init__(self, backend: str, captured: bool = False, **options: Any) -> None:
        self.clock, self.is_by_tokens = Clock(), "lr" not in options
        options = {"lr": BY_TOKENS.at(self.clock), "skip_nonfinite": True, **options}
        super().__init__(backend, captured, **options)
        self.optimizer: FusedAdamW
        self.history = self.optimizer.history(capacity=100)
        self.extra = [lambda: torch.tensor(self.clock.count)]
        self.train_step = self.step(self._train_step)

    def _train_step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        self.optimizer.step()
        if self.is_by_tokens:
            self.optimizer.advance(self.clock, 30)
        return loss

    def train(self, steps: range) -> None:
        for index in steps:
            self.train_step(*self.batch(index))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in itertools.count(100):
            random.random()
            np.random.rand()
            torch.rand(())
            yield self.batch(index)

    def find_lr(self, **options: Any) -> RangeTest:
        def train_step(batch: tuple[Tensor, Tensor]) -> Tensor:
            return self.train_step(*batch)

        arguments = {"low": 1e-5, "high": 0.1, "steps": STEPS, "model": self.model, **options}
        return find_lr(train_step, self.optimizer, self.batches(), **arguments)

    def everything(self) -> list[Tensor]:
        found = [torch.tensor([random.getstate()[1]]), torch.from_numpy(np.random.get_state()[1].copy())]
        engine = engine_of(self.optimizer)
        found += [table.rows.clone() for table in engine.tables.values()]
        state = engine.state_on(torch.device("cpu"))
        found += [each.clone() for each in (state.completed, state.skipped, self.history.block)]
        return [*self.state(), *found]


def dtypes(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(torch.int64) if tensor.dtype in (torch.uint32, torch.uint64) else tensor for tensor in tensors]


@pytest.mark.parametrize("done", [0, 5], ids=["before the first step", "in mid-run"])
def test_everything_is_put_back(backend: str, done: int) -> None:
    run, undisturbed = Run(backend), Run(backend)
    for each in (run, undisturbed):
        torch.manual_seed(1)
        each.train(range(done))
        if done:
            each.optimizer.begin_decay()
    torch.manual_seed(2)
    before = run.everything()
    found = run.find_lr()
    assert len(found.losses) == STEPS
    assert same_bits(dtypes(run.everything()), dtypes(before))
    assert (len(run.optimizer.state) > 0) == (done > 0)
    assert run.optimizer.param_groups[0]["lr_schedule"] == BY_TOKENS.at(run.clock)
    assert len(run.history.read().step) == done
    undisturbed.history.read()
    for each in (run, undisturbed):
        torch.manual_seed(3)
        each.train(range(done, done + 6))
    assert same_bits(dtypes(run.everything()), dtypes(undisturbed.everything()))


@pytest.mark.parametrize("done", [0, 2, 5], ids=["nothing made", "warming up", "captured"])
def test_graphs_go_on_as_if_nothing_had_happened(graphs: Graphs, done: int) -> None:
    run, undisturbed = Run(NAME, captured=True), Run(NAME)
    for each in (run, undisturbed):
        torch.manual_seed(1)
        each.train(range(done))
    rates = []
    for _ in range(2):
        found = run.find_lr()
        rates.append(found.rates)
        assert found.losses[0] != found.losses[-1]
    assert rates[0] == rates[1]
    for each in (run, undisturbed):
        torch.manual_seed(3)
        each.train(range(done, done + 6))
    assert same_bits(run.state(), undisturbed.state())
    assert graphs.events.count("capture") == 1
    assert run.clock.count == 30 * (done + 6)


def test_a_graph_that_is_captured_in_the_sweep_goes_on(graphs: Graphs) -> None:
    """Nothing is on the device before: what the graph counts in has to outlive the sweep."""
    betas = Linear(start_lr=0.9, end_lr=0.99, total_steps=100)
    worlds = [World(NAME, captured, lr=0.01, betas=(0.9, betas.at(Clock()))) for captured in (True, False)]
    for world in worlds:

        def train_step(x: Tensor, y: Tensor, world: World = world) -> Tensor:
            world.optimizer.zero_grad()
            loss = world.loss(x, y)
            loss.backward()
            world.optimizer.step()
            world.optimizer.advance(world.optimizer.param_groups[0]["betas"][1].clock, 10)
            return loss

        step = world.step(train_step)
        if world is worlds[0]:
            batches = [world.batch(index) for index in range(100)]
            find_lr(lambda batch, step=step: step(*batch), world.optimizer, batches, high=0.1, model=world.model)
        torch.manual_seed(3)
        for group in world.optimizer.param_groups:
            group["lr"] = Linear(start_lr=0.0, end_lr=1.0, total_steps=100)
        for index in range(5):
            step(*world.batch(index))
        assert world.optimizer.param_groups[0]["lr"].item() == 0.04
        assert world.optimizer.state_dict()["param_groups"][0]["lr_schedule"]["step"] == 5
    assert same_bits(worlds[0].state(), worlds[1].state())
    assert graphs.events.count("capture") == 1


@pytest.mark.parametrize("captured", [False, True])
def test_the_losses_are_those_of_a_run_at_these_rates(graphs: Graphs, captured: bool) -> None:
    by_hand, run = Run(NAME, lr=1e-3), Run(NAME, captured, lr=1e-3)
    torch.manual_seed(4)
    found = run.find_lr()
    torch.manual_seed(4)
    losses = []
    for rate, batch in zip(found.rates, by_hand.batches(), strict=False):
        by_hand.optimizer.param_groups[0]["lr"] = rate
        losses.append(float(by_hand.train_step(*batch).detach()))
    assert list(found.losses) == losses
    assert found.rates[0] == 1e-5
    assert found.rates[-1] == pytest.approx(0.1, rel=1e-14)
    assert list(found.rates) == Exponential(peak_lr=1e-5, gamma=1e4, every=STEPS - 1).values(0, STEPS)
    ratios = [b / a for a, b in itertools.pairwise(found.rates)]
    assert ratios == pytest.approx([10 ** (4 / (STEPS - 1))] * (STEPS - 1))
    assert run.optimizer.param_groups[0]["lr"] == 1e-3


LOW_MEMORY: dict[str, Any] = {
    "master_weight_bits": 32,
    "exp_avg_dtype": torch.int8,
    "exp_avg_sq_dtype": torch.uint8,
    "stochastic_rounding": True,
}


@pytest.mark.parametrize("done", [0, 3])
def test_low_memory_state_is_put_back(backend: str, done: int) -> None:
    def make() -> tuple[FusedAdamW, Callable[[Tensor], Tensor]]:
        torch.manual_seed(5)
        (param,) = make_params([(5000,)], torch.bfloat16)
        optimizer = FusedAdamW([param], lr=1e-2, backend=backend, amsgrad=True, **LOW_MEMORY)

        def train_step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = (param.float() * x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        return optimizer, train_step

    batches = [torch.rand(5000) for _ in range(8)]
    ends = []
    for interrupts in (True, False):
        optimizer, train_step = make()
        for batch in batches[:done]:
            train_step(batch)
        if interrupts:
            find_lr(train_step, optimizer, batches, steps=5)
        for batch in batches[done:]:
            train_step(batch)
        ends.append(snapshot(optimizer))
    assert same_bits(*ends)


def test_what_drives_the_rate_goes_on() -> None:
    """Tensors of the user's, schedulers of torch's and of nexus's, a step in the backward pass."""
    lr = torch.tensor(0.25)
    tensor = FusedAdamW(make_params([(3,)]), lr=lr, weight_decay=Constant(0.5))
    torchs, ours = FusedAdamW(make_params([(3,)]), lr=0.5), FusedAdamW(make_params([(3,)]))
    scheduler = torch.optim.lr_scheduler.StepLR(torchs, 1, 0.5)
    scheduler_of_ours = WSDScheduler(ours, warmup_steps=2, stable_steps=2, decay_steps=4, peak_lr=1.0)
    for optimizer in (tensor, torchs, ours):
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = torch.full((3,), 7.0)
        grad = param.grad

        def train_step(x: Tensor, param: Tensor = param, optimizer: FusedAdamW = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (param * x).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        items = dict(optimizer.param_groups[0])
        find_lr(train_step, optimizer, [torch.ones(3)] * 5, steps=5)
        group = optimizer.param_groups[0]
        assert group.keys() == items.keys()
        assert all(group[name] is items[name] for name in items)
        assert param.grad is grad
        assert torch.equal(grad, torch.full((3,), 7.0))
    assert tensor.param_groups[0]["lr"] is lr
    assert float(lr) == 0.25
    assert float(tensor.param_groups[0]["weight_decay"]) == 0.5
    for each in (scheduler, scheduler_of_ours):
        each.step()
    assert (torchs.param_groups[0]["lr"], float(ours.param_groups[0]["lr"])) == (0.25, 0.5)


def test_updates_in_the_backward_pass_are_swept_too() -> None:
    def run(interrupts: bool) -> list[Tensor]:
        torch.manual_seed(6)
        model = torch.nn.Linear(4, 3)
        optimizer = FusedAdamW(model.parameters(), lr=BY_TOKENS)

        def train_step(x: Tensor) -> Tensor:
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        with step_in_backward(model, optimizer):
            for index in range(6):
                train_step(torch.full((2, 4), float(index)))
                if interrupts and index == 2:
                    found = find_lr(train_step, optimizer, itertools.repeat(torch.ones(2, 4)), low=0.01, high=0.1)
                    assert found.losses[40] < found.losses[0]
        return snapshot(optimizer)

    assert same_bits(run(True), run(False))


# When it ends, and what it suggests.


def quadratic(optimizer: FusedAdamW, param: Tensor) -> Callable[[float], Tensor]:
    def train_step(factor: float) -> Tensor:
        optimizer.zero_grad()
        loss = factor * param.square().sum()
        loss.backward()
        optimizer.step()
        return loss

    return train_step


def test_the_sweep_ends_where_the_loss_diverges() -> None:
    (param,) = make_params([(3,)])
    optimizer = FusedAdamW([param])
    found = find_lr(quadratic(optimizer, param), optimizer, itertools.repeat(1.0), high=1e6, steps=50)
    assert len(found.losses) in range(10, 50, 5)  # it is looked at ten times
    means = [sum(found.losses[i : i + 5]) for i in range(0, len(found.losses), 5)]
    assert means[-1] > 4 * min(means)
    assert max(means[:-1]) < 4 * min(means)
    assert max(found.smoothed) <= max(found.losses[:5])
    factors = itertools.chain([1.0] * 7, itertools.repeat(math.nan))
    found = find_lr(quadratic(optimizer, param), optimizer, factors, steps=100)
    assert len(found.losses) == 10
    assert all(map(math.isnan, found.losses[7:]))
    assert all(map(math.isfinite, found.smoothed))


def test_a_loss_below_zero_is_no_divergence() -> None:
    (param,) = make_params([(3,)])
    optimizer = FusedAdamW([param], maximize=True)
    found = find_lr(quadratic(optimizer, param), optimizer, itertools.repeat(-1.0), high=0.1, steps=40)
    assert len(found.losses) == 40


def test_the_suggestion_is_where_the_smoothed_loss_falls_most() -> None:
    rates = tuple(10.0**i for i in range(8))
    assert _suggested(rates, (9.0, 8.9, 8.0, 5.0, 3.0, 2.9, 4.0, 9.0)) == 1e3
    assert _suggested(rates, (9.0, 8.9, 8.8, 8.0, 7.8, 99.0, 9.0, 1.0)[:5]) == 1e3
    assert _suggested(rates[:4], (9.0, 8.0, math.nan, 1.0)) is None  # no slope before the least
    assert _suggested(rates, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)) is None
    assert _suggested((), ()) is None


def test_the_smoothed_loss_is_a_mean_of_those_on_both_sides() -> None:
    losses = [5.0, 1.0, 2.0, 3.0, 4.0, 80.0, math.nan, -1.0, 0.0, 2.0]
    bounded = [5.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0, -1.0, 0.0, 2.0]  # by the first five
    expected = []
    for i in range(10):
        weights = [0.8 ** abs(i - j) for j in range(10)]
        expected.append(sum(map(math.prod, zip(weights, bounded, strict=True))) / sum(weights))
    assert _smoothed(losses, 0.2) == pytest.approx(expected, rel=1e-14)
    assert _smoothed(losses, 1.0) == bounded
    assert all(map(math.isnan, _smoothed([math.nan] * 5 + [1.0], 0.5)))
    assert _smoothed([], 0.5) == []


def test_the_suggestion_is_not_the_noises() -> None:
    """A fall from 3 to 1 around a rate of 0.01, in a noise as large, and at the end a divergence."""
    torch.manual_seed(0)
    rates = Exponential(peak_lr=1e-7, gamma=1e8, every=99).values(0, 100)
    found = []
    for _ in range(20):
        noise = (0.5 * torch.randn(100)).tolist()
        losses = [2.0 - math.tanh(math.log(100 * rate)) + extra for rate, extra in zip(rates, noise, strict=True)]
        losses[88:] = [10.0**i for i in range(12)]
        found.append(_suggested(tuple(rates), tuple(_smoothed(losses, 0.1))))
    assert all(0.001 < rate < 0.1 for rate in found)


def test_it_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for suggestion, losses in ((0.1, (3.0, 2.0, 1.0, 9.0)), (None, (1.0, math.nan, math.nan, math.nan))):
        test = RangeTest((0.01, 0.1, 1.0, 10.0), losses, losses, suggestion)
        test.plot(tmp_path / "test.png")
        assert (tmp_path / "test.png").read_bytes()[:4] == b"\x89PNG"


# Bad input.


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"low": 0.0}, ValueError, "low must be a finite number > 0, got 0.0"),
        ({"low": 1.0, "high": 1.0}, ValueError, "low must be below high=1.0, and not by more than a float holds"),
        ({"low": 1e-300, "high": 1e300}, ValueError, "low must be below high"),
        ({"high": math.inf}, ValueError, "high must be a finite number > 0"),
        ({"steps": 2}, ValueError, "steps must be an int from 3"),
        ({"smoothing": 0}, ValueError, "smoothing must be a number above 0 and at most 1"),
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module or None, got 'net'"),
        ({"batches": 3}, TypeError, "batches must be iterable, got 3"),
        (
            {"batches": [1.0] * 9},
            ValueError,
            r"batches must be at least steps=10, got 9: .*itertools.cycle\(batches\)",
        ),
        ({"batches": iter([1.0] * 9)}, ValueError, "batches must be at least steps=10, got 9"),
        ({"train_step": None}, TypeError, "train_step must be callable, got None"),
        (
            {"optimizer": torch.optim.AdamW(make_params([(2,)]))},
            TypeError,
            "optimizer must be a nexus.optim.FusedAdam",
        ),
    ],
)
def test_what_is_not_allowed_changes_nothing(options: dict[str, Any], error: type[Exception], words: str) -> None:
    (param,) = make_params([(3,)])
    optimizer = FusedAdamW([param], lr=0.5)
    before = param.detach().clone()
    arguments = {"train_step": quadratic(optimizer, param), "optimizer": optimizer, "steps": 10} | options
    batches = arguments.pop("batches", [1.0] * 10)
    with pytest.raises(error, match=words):
        find_lr(arguments.pop("train_step"), arguments.pop("optimizer"), batches, **arguments)
    assert torch.equal(param, before)
    assert param.grad is None
    assert (optimizer.param_groups[0]["lr"], len(optimizer.state)) == (0.5, 0)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda loss: None, "train_step must return the loss, a 0-dim floating-point tensor, got None"),
        (lambda loss: float(loss.detach()), "got 3"),
        (lambda loss: loss.reshape(1), r"got the shape \(1,\) of torch.float32"),
        (lambda loss: loss.long(), r"got the shape \(\) of torch.int64"),
    ],
)
def test_a_loss_that_is_none_is_refused(returned: Callable[[Tensor], Any], words: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([param], lr=0.5)
    step = quadratic(optimizer, param)
    with pytest.raises(TypeError, match=words):
        find_lr(lambda batch: returned(step(batch)), optimizer, [1.0] * 10, steps=10)
    assert torch.equal(param, torch.ones(3))
    assert (optimizer.param_groups[0]["lr"], len(optimizer.state)) == (0.5, 0)


def test_a_step_of_another_optimizer_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer, other = FusedAdamW([param], lr=0.5), torch.optim.SGD([param], lr=0.1)
    with pytest.raises(ValueError, match="train_step must step the optimizer that find_lr was given, and has not"):
        find_lr(quadratic(other, param), optimizer, [1.0] * 10, steps=10)
    assert torch.equal(param, torch.ones(3))
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_step_that_fails_leaves_no_trace(graphs: Graphs) -> None:
    run = Run(NAME, captured=True)
    torch.manual_seed(1)
    run.train(range(5))
    torch.manual_seed(2)
    before = run.everything()

    def train_step(batch: tuple[Tensor, Tensor]) -> Tensor:
        run.train_step(*batch)
        raise OverflowError("too much")

    with pytest.raises(OverflowError, match="too much"):
        find_lr(train_step, run.optimizer, run.batches(), model=run.model)
    assert same_bits(dtypes(run.everything()), dtypes(before))
    run.train(range(5, 7))
    assert run.clock.count == 210
