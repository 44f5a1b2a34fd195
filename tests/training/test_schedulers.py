"""The schedulers over torch's optimizers and over FusedAdamW: one set of rates, that of the oracle."""

import copy
import io
import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from references import Float64AdamW, assert_same_run, make_params, step_both
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import SequentialLR

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant, Cosine, CosineRestarts, Schedule
from nexus.training.schedulers import CosineAnnealingScheduler, CosineRestartScheduler, ScheduleLR, WSDScheduler

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "FusedAdamW": FusedAdamW,
    "torch": lambda params, **options: FusedAdamW(params, backend="torch", **options),
    "reference": lambda params, **options: FusedAdamW(params, backend="reference", **options),
}
GIVEN = WSD(warmup_steps=3, stable_steps=5, decay_steps=6, peak_lr=1e-2, min_lr=1e-4)
SCHEDULES = [
    GIVEN,
    replace(GIVEN, decay_type="sqrt"),
    replace(GIVEN, decay_type="cosine"),
    replace(GIVEN, warmup_steps=0, stable_steps=None),
    CosineRestarts(peak_lr=1e-2, min_lr=1e-4, cycle_length=4, cycle_mult=2.0, warmup_steps=3),
    CosineRestarts(peak_lr=1e-2, cycle_length=3),
    Cosine(peak_lr=1e-2, total_steps=14, min_lr=1e-4, warmup_steps=2),
    Constant(1e-2),
]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
each_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)
both = pytest.mark.parametrize("kind", ["AdamW", "FusedAdamW"])


def attach(optimizer: Optimizer, schedule: Schedule, **more: Any) -> Any:
    """The scheduler of a schedule, given what is not a default of that."""
    values = [(field, getattr(schedule, field.name)) for field in fields(schedule)]
    arguments = {field.name: value for field, value in values if value != field.default} | more
    if isinstance(schedule, WSD):
        return WSDScheduler(optimizer, **arguments)
    if isinstance(schedule, CosineRestarts):
        return CosineRestartScheduler(optimizer, **arguments)
    if not isinstance(schedule, Cosine):
        return ScheduleLR(optimizer, schedule, **more)
    return CosineAnnealingScheduler(optimizer, **{"warmup_steps": 0, **arguments})


class Run:
    """A small model, an optimizer and a scheduler over it, after some steps.

    Args:
        kind: of OPTIMIZERS.
        schedule: of the scheduler; None for none.
        group: options of the one group.
        options: of the optimizer.
    """

    def __init__(
        self,
        kind: str,
        steps: int = 0,
        schedule: Schedule | None = GIVEN,
        group: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        groups = [{"params": self.model.parameters(), **(group or {})}]
        self.optimizer: Any = OPTIMIZERS[kind](groups, **{"lr": 0.5, **options})
        self.scheduler: Any = None if schedule is None else attach(self.optimizer, schedule)
        self.train(steps)

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def train(self, steps: int) -> list[float]:
        """The rates that `steps` updates use; the batch of an update depends on the scheduler's count alone."""
        used = []
        for _ in range(steps):
            batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(self.scheduler.last_epoch))
            self.model(batch).square().mean().backward()
            used += self.rates()[:1]
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return used


def same(kind: str, used: list[float], expected: list[float]) -> bool:
    """Bit for bit, but where square root and cosine are torch's."""
    ulps = 2 if kind in ("torch", "reference") else 0
    return all(abs(a - b) <= ulps * math.ulp(b) for a, b in zip(used, expected, strict=True))


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


DOCUMENTED = [
    WSD(warmup_steps=1000, stable_steps=50000, decay_steps=10000, peak_lr=1e-3, min_lr=1e-5),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=10000, cycle_mult=2.0, warmup_steps=500),
]


@both
@pytest.mark.parametrize("schedule", DOCUMENTED, ids=repr)
def test_every_step_of_the_documented_schedules(schedule: Schedule, kind: str) -> None:
    run = Run(kind, schedule=schedule)
    run.optimizer.step()
    used = []
    for _ in range(61_002):
        used += run.rates()
        run.scheduler.step()
    assert used == schedule.values(0, len(used))


@each_optimizer
@each_schedule
def test_rates_are_the_oracles(schedule: Schedule, kind: str) -> None:
    run = Run(kind, schedule=schedule)
    for step in range(25):
        last = run.scheduler.get_last_lr()
        assert [type(rate) for rate in last] == [float]
        assert last == [schedule(step)]
        assert same(kind, run.rates(), last)
        assert run.scheduler.get_phase() == run.scheduler.get_phase(step) == schedule.phase(step)
        run.train(1)


def test_a_tensor_rate_is_filled_and_the_last_rate_is_a_float() -> None:
    lr = torch.tensor(0.5)
    run = Run("AdamW", 2, lr=lr)
    assert run.optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == float(torch.tensor(GIVEN(2)))
    assert run.scheduler.get_last_lr() == [GIVEN(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_schedule
def test_parameters_follow_torch_in_float64(schedule: Schedule, dtype: torch.dtype) -> None:
    params = make_params([(37,)], dtype)
    optimizer = FusedAdamW(params, weight_decay=0.1)
    reference = Float64AdamW(params, lr=schedule, weight_decay=0.1)
    scheduler = attach(optimizer, schedule)
    for _ in range(60):
        step_both(optimizer, reference, steps=1)
        scheduler.step()
    assert_same_run(optimizer, reference)


def test_cycle_info() -> None:
    scheduler = Run(
        "AdamW", 2, CosineRestarts(peak_lr=1.0, min_lr=0.0, cycle_length=4, cycle_mult=2.0, warmup_steps=3)
    ).scheduler
    assert scheduler.get_cycle_info() == {"cycle_idx": -1, "step_in_cycle": 2, "cycle_length": 3}
    assert scheduler.get_cycle_info(14) == {"cycle_idx": 1, "step_in_cycle": 7, "cycle_length": 8}
    assert [scheduler.get_phase(step) for step in (2, 3)] == ["warmup", "cosine"]


@each_optimizer
def test_scales_of_groups(kind: str) -> None:
    run = Run(kind, group={"lr_scale": 0.1})
    scales = [0.1]
    for step in range(10):
        if step == 3:
            run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
            run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr_scale": 2.0})
            scales += [1.0, 2.0]
        if step == 5:
            run.optimizer.param_groups[1]["lr_scale"] = scales[1] = 3.0
        if step not in (3, 5):  # when the scheduler has not seen them
            assert run.rates() == run.scheduler.get_last_lr() == [scale * GIVEN(step) for scale in scales]
        run.train(1)


@both
@each_schedule
def test_state_is_plain(schedule: Schedule, kind: str) -> None:
    run = Run(kind, 5, schedule, lr=torch.tensor(0.5))
    state = run.scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state == through_a_file(state)
    assert through_a_file(run.optimizer.state_dict())["param_groups"][0]["lr"] == pytest.approx(schedule(5))


@pytest.mark.parametrize("how", ["optimizer first", "scheduler first", "last_epoch"])
@both
@each_schedule
def test_resuming(schedule: Schedule, kind: str, how: str) -> None:
    whole, interrupted, resumed = Run(kind, 0, schedule), Run(kind, 9, schedule), Run(kind, schedule=None)
    used = whole.train(20)
    parts = (interrupted.model, interrupted.optimizer, interrupted.scheduler)
    model, optimizer, scheduler = through_a_file([part.state_dict() for part in parts])
    resumed.model.load_state_dict(model)
    if how == "last_epoch":
        resumed.optimizer.load_state_dict(optimizer)
        resumed.scheduler = attach(resumed.optimizer, schedule, last_epoch=8)
    else:
        resumed.scheduler = attach(resumed.optimizer, schedule)
        loads = [(resumed.optimizer, optimizer), (resumed.scheduler, scheduler)]
        for part, state in loads if how == "optimizer first" else reversed(loads):
            part.load_state_dict(state)
        assert resumed.scheduler.state_dict() == interrupted.scheduler.state_dict()
    assert resumed.train(11) == used[9:] == schedule.values(9, 20)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("edit", ["begin_decay", "extend_stable"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 7, 8, 10, 13, 14, 20], ids=lambda at: f"at{at}")
@each_optimizer
def test_edits_in_every_phase(kind: str, at: int, edit: str) -> None:
    run, resumed = Run(kind, at), Run(kind)
    scheduler, before = run.scheduler, GIVEN.phase(at)
    if edit == "begin_decay":
        scheduler.begin_decay()
        expected = GIVEN.begin_decay(at)
        assert expected(at) == pytest.approx(GIVEN(at), rel=1e-15)  # from the rate of that moment
        assert scheduler.get_phase() == ("done" if before == "done" else "decay")
    else:
        scheduler.extend_stable(4)
        expected = GIVEN if before in ("decay", "done") else GIVEN.extend_stable(4)
        assert scheduler.get_phase() == before
    assert scheduler.schedule == expected
    assert scheduler.get_last_lr() == run.rates() == [expected(at)]
    assert run.train(3) == expected.values(at, at + 3)

    resumed.scheduler.load_state_dict(through_a_file(scheduler.state_dict()))
    assert resumed.scheduler.schedule == expected
    resumed.scheduler.begin_decay()  # and it can be edited further
    assert resumed.train(15) == expected.begin_decay(at + 3).values(at + 3, at + 18)
    assert run.train(15) == expected.values(at + 3, at + 18)


@both
def test_an_open_ended_run(kind: str) -> None:
    run = Run(kind, schedule=replace(GIVEN, stable_steps=None))
    used = run.train(50)
    run.scheduler.begin_decay()
    assert used + run.train(10) == WSD(
        warmup_steps=3, stable_steps=47, decay_steps=6, peak_lr=1e-2, min_lr=1e-4
    ).values(0, 60)


def test_the_rate_is_one_tensor_that_stays() -> None:
    run = Run("FusedAdamW")
    group = run.optimizer.param_groups[0]
    rate = group["lr"]
    assert (type(rate), rate.shape, rate.dtype) == (Tensor, (), torch.float64)
    address = rate.data_ptr()
    run.train(4)
    saved = through_a_file([run.optimizer.state_dict(), run.scheduler.state_dict()])
    assert isinstance(saved[0]["param_groups"][0]["lr"], float)
    run.train(6)
    run.scheduler.begin_decay()
    run.optimizer.load_state_dict(saved[0])
    run.scheduler.load_state_dict(saved[1])
    run.train(2)
    group["lr"] = 7.0  # a number of the user's lasts until the scheduler's next step
    run.train(1)
    run.scheduler = CosineRestartScheduler(run.optimizer, peak_lr=1.0)
    assert group["lr"] is rate
    assert rate.data_ptr() == address
    assert float(rate) == 1.0


@both
def test_whichever_scheduler_steps_last_is_in_force(kind: str) -> None:
    run = Run(kind)
    first, second = run.scheduler, attach(run.optimizer, CosineRestarts(peak_lr=1.0, cycle_length=4))
    run.scheduler = SequentialLR(run.optimizer, [first, second], milestones=[6])
    assert run.train(15) == [*GIVEN.values(0, 6), *second.schedule.values(0, 9)]
    first.step()
    assert run.rates() == first.get_last_lr()


@both
def test_a_copy_goes_on_by_itself(kind: str) -> None:
    run = Run(kind, 2)
    copied = copy.deepcopy(run)
    used = run.train(10)
    assert copied.rates() == [GIVEN(2)]
    assert copied.train(10) == used == GIVEN.values(2, 12)


@each_optimizer
def test_step_to_an_epoch(kind: str) -> None:
    run = Run(kind, 2)
    with pytest.warns(UserWarning, match="epoch parameter"):
        run.scheduler.step(9)
    assert run.rates() == run.scheduler.get_last_lr() == [GIVEN(9)]
    assert run.train(5) == GIVEN.values(9, 14)
    with pytest.warns(UserWarning, match="epoch parameter"), pytest.raises(ValueError, match="epoch must be"):
        run.scheduler.step(-1)
    assert run.scheduler.last_epoch == 14


@each_optimizer
def test_the_peak_is_the_optimizers_rate(kind: str) -> None:
    run = Run(kind, schedule=None, lr=0.25)
    for _ in range(2):  # the second time the group's own rate is not the peak
        run.scheduler = CosineAnnealingScheduler(run.optimizer, warmup_steps=2, total_steps=8)
        assert run.scheduler.schedule == Cosine(peak_lr=0.25, total_steps=8, warmup_steps=2)
        run.train(1)
