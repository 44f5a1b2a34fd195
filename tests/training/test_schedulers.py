"""The schedulers over torch's optimizers and over FusedAdamW: one set of rates, that of the oracle."""

import copy
import io
import json
import math
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR
from torch.utils.data import DataLoader

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine, CosineRestarts, Schedule
from nexus.training.schedulers import CosineAnnealingScheduler, CosineRestartScheduler, WSDScheduler

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "FusedAdamW": FusedAdamW,
    "reference": lambda params, **options: FusedAdamW(params, backend="reference", **options),
}
BOTH = ("AdamW", "FusedAdamW")
WSD_ARGS = {"warmup_steps": 3, "stable_steps": 5, "decay_steps": 6, "peak_lr": 1e-2, "min_lr": 1e-4}


class Case(NamedTuple):
    scheduler: Callable[..., Any]
    arguments: dict[str, Any]
    oracle: Schedule

    def attach(self, optimizer: Optimizer, **more: Any) -> Any:
        return self.scheduler(optimizer, **self.arguments, **more)


SGDR_ARGS = {"peak_lr": 1e-2, "min_lr": 1e-4, "cycle_length": 4, "cycle_mult": 2.0, "warmup_steps": 3}
COSINE_ARGS = {"warmup_steps": 2, "max_steps": 14, "peak_lr": 1e-2, "min_lr": 1e-4}
CASES = [
    Case(WSDScheduler, WSD_ARGS, WSD(3, 5, 6, 1e-2, 1e-4)),
    Case(WSDScheduler, {**WSD_ARGS, "decay_type": "sqrt"}, WSD(3, 5, 6, 1e-2, 1e-4, "sqrt")),
    Case(WSDScheduler, {**WSD_ARGS, "decay_type": "cosine"}, WSD(3, 5, 6, 1e-2, 1e-4, "cosine")),
    Case(WSDScheduler, {**WSD_ARGS, "warmup_steps": 0, "stable_steps": None}, WSD(0, None, 6, 1e-2, 1e-4)),
    Case(CosineRestartScheduler, SGDR_ARGS, CosineRestarts(1e-2, 1e-4, 4, 2.0, 3)),
    Case(CosineRestartScheduler, {"peak_lr": 1e-2, "cycle_length": 3}, CosineRestarts(1e-2, cycle_length=3)),
    Case(CosineAnnealingScheduler, COSINE_ARGS, Cosine(1e-2, 14, 1e-4, 2)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.oracle))
each_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)
both = pytest.mark.parametrize("kind", BOTH)


class Model(nn.Module):
    """Returns its loss, as the documentation's loop wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, batch: Tensor) -> Tensor:
        return self.layers(batch).square().mean()


def make(kind: str, **options: Any) -> tuple[Model, Optimizer]:
    model = Model()
    return model, OPTIMIZERS[kind](model.parameters(), **{"lr": 0.5, **options})


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def train(model: Model, optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> list[float]:
    """The rates that `steps` updates use; the batch of an update depends on the scheduler's count alone."""
    used = []
    for _ in range(steps):
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(scheduler.last_epoch))
        model(batch).backward()
        used += rates(optimizer)[:1]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return used


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@both
def test_the_documentation_runs(kind: str) -> None:
    model, optimizer = make(kind)
    dataloader = DataLoader(torch.randn(120, 3, generator=torch.Generator().manual_seed(1)), batch_size=2)
    used = []

    scheduler = WSDScheduler(
        optimizer, warmup_steps=1000, stable_steps=50000, decay_steps=10000, peak_lr=1e-3, min_lr=1e-5
    )
    scheduler = CosineRestartScheduler(
        optimizer, peak_lr=1e-3, min_lr=1e-6, cycle_length=10000, cycle_mult=2.0, warmup_steps=500
    )
    for _step, batch in enumerate(dataloader):
        loss = model(batch)
        loss.backward()
        used += rates(optimizer)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    assert used == CosineRestarts(1e-3, 1e-6, 10000, 2.0, 500).values(0, 60)


@pytest.mark.parametrize("oracle", [WSD(1000, 50000, 10000, 1e-3, 1e-5), CosineRestarts(1e-3, 1e-6, 10000, 2.0, 500)])
def test_every_step_of_the_documented_schedules(oracle: WSD | CosineRestarts) -> None:
    attach = WSDScheduler if isinstance(oracle, WSD) else CosineRestartScheduler
    for kind in BOTH:
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = OPTIMIZERS[kind]([parameter])
        scheduler = attach(optimizer, *astuple(oracle))  # type: ignore[arg-type]
        optimizer.step()
        used = []
        for _ in range(61_002):
            used += rates(optimizer)
            scheduler.step()
        assert used == oracle.values(0, len(used))


@each_optimizer
@each_case
def test_rates_are_the_oracles(case: Case, kind: str) -> None:
    model, optimizer = make(kind)
    attached = case.attach(optimizer)
    for step in range(25):
        last = attached.get_last_lr()
        assert [type(rate) for rate in last] == [float]
        assert last == [case.oracle(step)]
        ulp = 2 * math.ulp(last[0]) if kind == "reference" else 0.0  # torch's functions are not libm's
        assert abs(rates(optimizer)[0] - last[0]) <= ulp
        assert attached.get_phase() == attached.get_phase(step) == case.oracle.phase(step)
        train(model, optimizer, attached, 1)


def test_a_tensor_rate_is_filled_and_the_last_rate_is_a_float() -> None:
    lr = torch.tensor(0.5)
    model, optimizer = make("AdamW", lr=lr)
    scheduler = WSDScheduler(optimizer, **WSD_ARGS)
    train(model, optimizer, scheduler, 2)
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == float(torch.tensor(scheduler.schedule(2)))
    assert scheduler.get_last_lr() == [scheduler.schedule(2)]


# Largest |difference| of a parameter after 300 updates at rates up to 1e-2. Measured: 3.3e-6 and 3.3e-14; torch's own
# AdamW in float32: 3.1e-5.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@each_case
def test_parameters_follow_torch_in_float64(case: Case, dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(37, dtype=torch.float64, generator=generator).float().double()
    ours, theirs = nn.Parameter(start.clone().to(dtype)), nn.Parameter(start.clone())
    fused = FusedAdamW([ours], weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], weight_decay=0.1, foreach=False, fused=False)
    pairs = [(optimizer, case.attach(optimizer)) for optimizer in (fused, reference)]
    for _ in range(300):
        grad = torch.randn(37, dtype=torch.float64, generator=generator).float().double()
        ours.grad, theirs.grad = grad.to(dtype), grad
        for optimizer, attached in pairs:
            optimizer.step()
            attached.step()
    assert (ours.double() - theirs).abs().max() < bound
    assert (theirs - start).abs().max() > 0.05


def test_cycle_info() -> None:
    _, optimizer = make("AdamW")
    scheduler = CosineRestartScheduler(optimizer, peak_lr=1.0, cycle_length=4, cycle_mult=2.0, warmup_steps=3)
    expected = {0: (-1, 0, 3), 2: (-1, 2, 3), 3: (0, 0, 4), 6: (0, 3, 4), 7: (1, 0, 8), 14: (1, 7, 8), 15: (2, 0, 16)}
    for step, values in expected.items():
        cycle = dict(zip(("cycle_idx", "step_in_cycle", "cycle_length"), values, strict=True))
        assert scheduler.get_cycle_info(step) == cycle
    assert scheduler.get_cycle_info() == scheduler.get_cycle_info(0)
    assert [scheduler.get_phase(step) for step in (2, 3)] == ["warmup", "cosine"]


@each_optimizer
def test_a_groups_scale(kind: str) -> None:
    model = Model()
    first, second = model.layers[0], model.layers[2]
    groups = [{"params": first.parameters(), "lr_scale": 0.1}, {"params": second.parameters()}]
    optimizer = OPTIMIZERS[kind](groups, lr=0.5)
    scheduler = WSDScheduler(optimizer, **WSD_ARGS)
    for step in range(10):
        if step == 5:
            optimizer.param_groups[1]["lr_scale"] = 3.0
        expected = [0.1 * scheduler.schedule(step), (3.0 if step > 5 else 1.0) * scheduler.schedule(step)]
        assert rates(optimizer) == scheduler.get_last_lr() == expected
        train(model, optimizer, scheduler, 1)


@both
@each_case
def test_state_is_plain(case: Case, kind: str) -> None:
    model, optimizer = make(kind, lr=torch.tensor(0.5))
    attached = case.attach(optimizer)
    train(model, optimizer, attached, 5)
    state = attached.state_dict()
    assert json.loads(json.dumps(state)) == state == through_a_file(state)
    assert through_a_file(optimizer.state_dict())["param_groups"][0]["lr"] == pytest.approx(case.oracle(5))


@pytest.mark.parametrize("how", ["optimizer first", "scheduler first", "last_epoch"])
@both
@each_case
def test_resuming(case: Case, kind: str, how: str) -> None:
    whole, model = make(kind), make(kind)
    uninterrupted = case.attach(whole[1])
    used = train(*whole, uninterrupted, 20)

    interrupted = case.attach(model[1])
    train(*model, interrupted, 9)
    saved = through_a_file([part.state_dict() for part in (*model, interrupted)])
    resumed, optimizer = make(kind)
    resumed.load_state_dict(saved[0])
    if how == "last_epoch":
        optimizer.load_state_dict(saved[1])
        attached = case.attach(optimizer, last_epoch=8)
    else:
        attached = case.attach(optimizer)
        for part, state in ((optimizer, saved[1]), (attached, saved[2]))[:: 1 if how == "optimizer first" else -1]:
            part.load_state_dict(state)
        assert attached.state_dict() == interrupted.state_dict()
    assert train(resumed, optimizer, attached, 11) == used[9:] == case.oracle.values(9, 20)
    for ours, theirs in zip(resumed.parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("edit", ["begin_decay", "extend_stable"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 7, 8, 10, 13, 14, 20], ids=lambda at: f"at{at}")
@each_optimizer
def test_edits_in_every_phase(kind: str, at: int, edit: str) -> None:
    model, optimizer = make(kind)
    scheduler = WSDScheduler(optimizer, **WSD_ARGS)
    train(model, optimizer, scheduler, at)
    schedule = scheduler.schedule
    before = scheduler.get_phase()
    if edit == "begin_decay":
        scheduler.begin_decay()
        expected = schedule.begin_decay(at)
        assert expected(at) == pytest.approx(schedule(at), rel=1e-15)  # from the rate of that moment
        assert scheduler.get_phase() == ("done" if before == "done" else "decay")
    else:
        scheduler.extend_stable(4)
        expected = schedule if before in ("decay", "done") else schedule.extend_stable(4)
        assert scheduler.get_phase() == before
    assert scheduler.schedule == expected
    assert scheduler.get_last_lr() == [expected(at)]
    assert rates(optimizer) == [expected(at)]
    assert train(model, optimizer, scheduler, 3) == expected.values(at, at + 3)

    _, other = make(kind)
    resumed = WSDScheduler(other, **WSD_ARGS)
    resumed.load_state_dict(through_a_file(scheduler.state_dict()))
    assert resumed.schedule == expected
    resumed.begin_decay()  # and it can be edited further
    later = expected.begin_decay(at + 3)
    for who, target in ((resumed, other), (scheduler, optimizer)):
        plan = later if who is resumed else expected
        assert train(model, target, who, 15) == plan.values(at + 3, at + 18)


@both
def test_an_open_ended_run(kind: str) -> None:
    model, optimizer = make(kind)
    scheduler = WSDScheduler(optimizer, **{**WSD_ARGS, "stable_steps": None})
    used = train(model, optimizer, scheduler, 50)
    scheduler.begin_decay()
    assert used + train(model, optimizer, scheduler, 10) == WSD(3, 47, 6, 1e-2, 1e-4).values(0, 60)


def test_the_rate_is_one_tensor_that_stays() -> None:
    model, optimizer = make("FusedAdamW")
    scheduler = WSDScheduler(optimizer, **WSD_ARGS)
    rate = optimizer.param_groups[0]["lr"]
    assert isinstance(rate, Tensor)
    assert rate.shape == ()
    assert rate.dtype == torch.float64
    address = rate.data_ptr()
    train(model, optimizer, scheduler, 4)
    saved = through_a_file([optimizer.state_dict(), scheduler.state_dict()])
    assert isinstance(saved[0]["param_groups"][0]["lr"], float)
    train(model, optimizer, scheduler, 6)
    scheduler.begin_decay()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    train(model, optimizer, scheduler, 2)
    optimizer.param_groups[0]["lr"] = 7.0  # a number of the user's lasts until the scheduler's next step
    train(model, optimizer, scheduler, 1)
    scheduler = CosineRestartScheduler(optimizer, peak_lr=1.0)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.data_ptr() == address
    assert float(rate) == 1.0


@both
def test_whichever_scheduler_steps_last_is_in_force(kind: str) -> None:
    model, optimizer = make(kind)
    first = WSDScheduler(optimizer, **WSD_ARGS)
    second = CosineRestartScheduler(optimizer, peak_lr=1.0, cycle_length=4)
    both_in_turn = SequentialLR(optimizer, [first, second], milestones=[6])
    expected = [*first.schedule.values(0, 6), *second.schedule.values(0, 9)]
    assert train(model, optimizer, both_in_turn, 15) == expected
    first.step()
    assert rates(optimizer) == first.get_last_lr()


@both
def test_a_group_added_while_training(kind: str) -> None:
    model, optimizer = make(kind)
    scheduler = WSDScheduler(optimizer, **WSD_ARGS)
    train(model, optimizer, scheduler, 2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr_scale": 2.0})
    train(model, optimizer, scheduler, 3)
    assert rates(optimizer) == scheduler.get_last_lr() == [1e-2, 2e-2]


@both
def test_a_copy_goes_on_by_itself(kind: str) -> None:
    model, optimizer = make(kind)
    scheduler = WSDScheduler(optimizer, **WSD_ARGS)
    train(model, optimizer, scheduler, 2)
    copied = copy.deepcopy((model, optimizer, scheduler))
    used = train(model, optimizer, scheduler, 10)
    assert rates(copied[1]) == [scheduler.schedule(2)]
    assert train(*copied, 10) == used == scheduler.schedule.values(2, 12)


@each_optimizer
def test_step_to_an_epoch(kind: str) -> None:
    model, optimizer = make(kind)
    scheduler = WSDScheduler(optimizer, **WSD_ARGS)
    train(model, optimizer, scheduler, 2)
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(9)
    assert rates(optimizer) == scheduler.get_last_lr() == [scheduler.schedule(9)]
    assert train(model, optimizer, scheduler, 5) == scheduler.schedule.values(9, 14)
    with pytest.warns(UserWarning, match="epoch parameter"), pytest.raises(ValueError, match="epoch must be"):
        scheduler.step(-1)
    assert scheduler.last_epoch == 14


@each_optimizer
def test_the_peak_is_the_optimizers_rate(kind: str) -> None:
    model, optimizer = make(kind, lr=0.25)
    for _ in range(2):  # the second time the group's own rate is not the peak
        scheduler = CosineAnnealingScheduler(optimizer, warmup_steps=2, max_steps=8)
        assert scheduler.schedule == Cosine(0.25, 8, warmup_steps=2)
        train(model, optimizer, scheduler, 1)
