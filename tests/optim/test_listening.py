"""Reports to an optimizer: decided on the device, by every backend, captured, saved and resumed."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from cuda_on_cpu import NAME
from references import BACKENDS, make_grads, make_params, set_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import lr_scheduler

from nexus.optim import FusedAdamW, listening
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Constant, Cosine, ReduceOnPlateau, Schedule
from nexus.schedules.table import ScheduleTable
from nexus.training import capture_train_step, find_lr

LOSSES = [3.0, 2.0, 2.0, 1.9999, math.nan, 2.5, 1.0, 1.0, 1.5, 1.0, 0.99999, 1.0, math.inf, 1.0, 1.0, 1.0]


def make(lr: Any, backend: str = "auto", **options: Any) -> FusedAdamW:
    return FusedAdamW(make_params([(3,)]), lr=lr, backend=backend, **options)


def step(optimizer: FusedAdamW) -> float:
    """The rate that the update used."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    set_grads(params, make_grads(params))
    optimizer.step()
    return float(optimizer.param_groups[0]["lr"])


def run(optimizer: FusedAdamW, losses: list[float]) -> list[float]:
    used = []
    for loss in losses:
        used.append(step(optimizer))
        optimizer.report(torch.tensor(loss))
    return used


def oracle(schedule: Schedule, losses: list[float], **options: Any) -> list[float]:
    """The rates of a schedule times torch's plateau, whose reductions are of the rate of the moment."""
    theirs = lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=1.0), **options)
    rates = []
    for t, loss in enumerate(losses):
        rates.append(schedule(t) * theirs.optimizer.param_groups[0]["lr"])
        theirs.step(float(torch.tensor(loss)))
    return rates


@pytest.mark.parametrize(
    "inner",
    [
        Cosine(peak_lr=1.0, total_steps=30, min_lr=0.25),
        WSD(warmup_steps=0, stable_steps=None, decay_steps=5, peak_lr=1.0),
    ],
    ids=repr,
)
def test_the_rate_is_the_schedules_times_torchs_factor(backend: str, inner: Schedule) -> None:
    given = {"factor": 0.5, "patience": 1, "cooldown": 1}
    used = run(make(ReduceOnPlateau(inner, eps=0.0, **given), backend), LOSSES)
    expected = oracle(inner, LOSSES, eps=0.0, **given)
    assert used == pytest.approx(expected, rel=1e-14)
    assert used[-1] < 0.2 * inner(len(LOSSES) - 1)


def test_a_constant_is_reduced_to_torchs_very_bits(backend: str) -> None:
    given = {"factor": 0.3, "patience": 0, "min_lr": 1e-4}
    theirs = lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=0.7), **given)
    optimizer = make(ReduceOnPlateau(Constant(0.7), **given), backend)
    for loss in LOSSES:
        assert step(optimizer) == theirs.optimizer.param_groups[0]["lr"]
        optimizer.report(loss)
        theirs.step(loss)


def test_every_n_reports_their_mean_counts(backend: str) -> None:
    optimizer = make(ReduceOnPlateau(Constant(1.0), factor=0.5, patience=0, every=3), backend)
    used = run(optimizer, [1.0, 2.0, 3.0, 9.0, 0.0, -6.0, 1.0, 1.0, 1.0, 1.0])  # means of 2, 1 and 1
    assert used == [1.0] * 9 + [0.5]


def test_the_least_rate_is_of_the_moment(backend: str) -> None:
    schedule = Cosine(
        peak_lr=1.0, total_steps=4, min_lr=0.5
    )  # 0.75 after the second report, which lowers it no further than to 0.25
    optimizer = make(ReduceOnPlateau(schedule, factor=0.1, patience=0, min_lr=0.25), backend)
    factors = [1.0, 1.0, 0.25 / 0.75, 0.25 / 0.75, 0.25 / 0.75, 0.25 / 0.75]
    expected = [schedule(t) * factor for t, factor in enumerate(factors)]
    assert run(optimizer, [1.0] * 6) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_goes_on_bit_for_bit(backend: str, every: int) -> None:
    schedule = ReduceOnPlateau(Cosine(peak_lr=1.0, total_steps=30), factor=0.5, patience=1, cooldown=2, every=every)
    whole, first, second = (make(schedule, backend) for _ in range(3))
    expected = run(whole, LOSSES)
    assert run(first, LOSSES[:7]) == expected[:7]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(first.state_dict())
    assert run(second, LOSSES[7:]) == expected[7:]
    assert len(set(expected)) > 3


def test_reductions_go_over_to_another_constant() -> None:
    first = make(ReduceOnPlateau(Constant(0.8), factor=0.5, patience=0))
    run(first, [1.0, 1.0, 1.0])
    second = make(ReduceOnPlateau(Constant(0.4), factor=0.5, patience=0))
    with pytest.warns(UserWarning, match=r"lr_schedule\.schedule\.lr was 0\.8 .* is 0\.4"):
        second.load_state_dict(first.state_dict())
    assert step(second) == 0.1


def test_a_scheduler_of_torchs_is_taken_over_in_mid_run(backend: str) -> None:
    scheduled, taken = ([{"params": make_params([(3,)]), "lr": lr} for lr in (0.7, 0.3)] for _ in range(2))
    optimizers = [FusedAdamW(groups, backend=backend) for groups in (scheduled, taken)]
    given = {"factor": 0.3, "patience": 1, "cooldown": 2, "min_lr": [0.1, 0.0]}
    real, theirs = (lr_scheduler.ReduceLROnPlateau(optimizer, **given) for optimizer in optimizers)
    for t, loss in enumerate([*LOSSES, *LOSSES]):
        if t == 5:
            optimizers[1].take_over(theirs)
        for optimizer in optimizers:
            step(optimizer)
        rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
        assert rates[0] == rates[1]
        real.step(loss)
        theirs.step(loss) if t < 5 else optimizers[1].report(loss)
    assert rates[0][0] == 0.1
    assert rates[0][1] < 0.01


@pytest.mark.parametrize("backend", [NAME, "triton"])
def test_a_captured_step_reports_its_own_loss(graphs: Any, backend: str) -> None:
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = FusedAdamW(
            model.parameters(),
            lr=ReduceOnPlateau(Cosine(peak_lr=0.1, total_steps=60), factor=0.5, patience=1, every=2),
            backend=backend,
        )

        def train_step(x: torch.Tensor, model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.report(loss)
            return loss

        call = capture_train_step(train_step, optimizer) if captured else train_step
        generator = torch.Generator().manual_seed(1)
        rates = []
        for _ in range(20):
            call(torch.randn(6, 4, generator=generator))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        ends.append([rates, optimizer.state_dict()["param_groups"][0]["lr_schedule"]])
    assert ends[0] == ends[1]
    assert ends[0][1]["reports"][5] < 0.6  # it was reduced


def test_a_report_reads_nothing_back() -> None:
    schedule = ReduceOnPlateau(Cosine(peak_lr=1.0, total_steps=10), patience=0)
    with FakeTensorMode():
        table = ScheduleTable(schedule, torch.device("cpu"))
        metric = torch.zeros((), dtype=torch.float64)
        table.report(metric, metric)


def test_a_run_without_reports_is_warned_of_once(backend: str) -> None:
    optimizer = make(ReduceOnPlateau(Constant(1.0)), backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()  # before any update
    step(optimizer)
    with pytest.warns(
        UserWarning, match="ReduceOnPlateau has heard no metric in 1 updates.*optimizer.report"
    ) as said:
        optimizer.state_dict()
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("metric", "error", "words"),
    [
        (torch.zeros(1), ValueError, r"metric must be a 0-dim tensor .* got the shape \(1,\).*mean\(\)"),
        (torch.zeros((), dtype=torch.complex64), ValueError, "real numbers, got the shape .*complex64"),
        (torch.zeros((), device="meta"), ValueError, "on meta"),
        ("0.5", TypeError, "metric must be a 0-dim tensor or a number, got '0.5'"),
        (None, TypeError, "metric must be a 0-dim tensor or a number, got None"),
    ],
)
def test_a_wrong_metric_changes_nothing(metric: Any, error: type[Exception], words: str, backend: str) -> None:
    optimizer = make(ReduceOnPlateau(Constant(1.0), patience=0), backend)
    optimizer.report(1.0)
    before = [table.rows.clone() for table in engine_of(optimizer).tables.values()]
    with pytest.raises(error, match=words):
        optimizer.report(metric)
    assert all(map(torch.equal, before, [table.rows for table in engine_of(optimizer).tables.values()]))


def test_a_range_test_sweeps_over_a_step_that_reports(backend: str) -> None:
    found = []
    for schedule in (Constant(0.5), ReduceOnPlateau(Constant(0.5), patience=0)):
        torch.manual_seed(0)
        optimizer = make(schedule, backend)
        (param,) = optimizer.param_groups[0]["params"]

        def train_step(x: torch.Tensor, param: Any = param, optimizer: Any = optimizer, hears: bool = bool(found)):
            optimizer.zero_grad()
            loss = (param - x).square().mean()
            loss.backward()
            optimizer.step()
            if hears:
                optimizer.report(loss)
            return loss

        found.append(find_lr(train_step, optimizer, [torch.ones(3)] * 20, low=1e-3, high=10.0, steps=20))
    assert found[0].losses == found[1].losses
    optimizer.report(1.0)
    optimizer.report(1.0)
    assert optimizer.state_dict()["param_groups"][0]["lr_schedule"]["reports"][5:7] == [0.05, 2.0]


@pytest.mark.parametrize("metric", [0.5, torch.zeros((), device="cpu")], ids=["number", "tensor"])
def test_a_graph_refuses_a_metric_that_it_would_freeze(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"the same number in each replay: metric is .*computes on cuda"):
        listening._on_device(metric, torch.device("cuda"))


def test_without_a_plateau_there_is_nobody_to_report_to() -> None:
    with pytest.raises(RuntimeError, match=r"no parameter group has a ReduceOnPlateau.*lr=ReduceOnPlateau\(schedule"):
        make(Constant(1.0)).report(1.0)


@pytest.mark.parametrize(
    "heard", ["x", [1.0], [1.0] * 7 + ["x"], [1.0, -1.0, 0, 0, 0, 1.0, 0, 1.0], [1.0] * 7 + [0.0]]
)
def test_what_was_saved_must_be_what_is_saved(heard: Any) -> None:
    optimizer = make(ReduceOnPlateau(Constant(1.0)))
    state = optimizer.state_dict()
    state["param_groups"][0]["lr_schedule"]["reports"] = heard
    with pytest.raises(ValueError, match=r"lr_schedule\['reports'\] must be the numbers best, bad"):
        optimizer.load_state_dict(state)
