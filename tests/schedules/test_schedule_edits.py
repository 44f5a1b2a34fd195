"""What `begin_decay` and `extend_stable` did to a schedule, over saving, loading and assigning another one."""

from __future__ import annotations

import warnings

import pytest
import torch
from references import make_grads, make_params, set_grads

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Constant, Linear, Piecewise, Schedule, join
from nexus.schedules.edits import differences
from nexus.schedules.wsd import WSD_DECAYS


def rates(optimizer: FusedAdamW, steps: int) -> list[float]:
    """The rates that the next updates use."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    used = []
    for _ in range(steps):
        set_grads(params, make_grads(params))
        optimizer.step()
        used.append(float(optimizer.param_groups[0]["lr"]))
    return used


def make(lr: WSD | float, backend: str) -> FusedAdamW:
    return FusedAdamW(make_params([(3,)]), lr=lr, backend=backend)


def resumed(optimizer: FusedAdamW, schedule: WSD) -> FusedAdamW:
    other = make(schedule, optimizer.backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedules differ on purpose
        other.load_state_dict(optimizer.state_dict())
    return other


@pytest.mark.parametrize(
    "schedule",
    [
        WSD(warmup_steps=0, stable_steps=5, decay_steps=10, peak_lr=1.0),
        WSD(warmup_steps=0, stable_steps=5, decay_steps=10, peak_lr=0.5),
        WSD(warmup_steps=0, stable_steps=50, decay_steps=10, peak_lr=1.0),
        WSD(warmup_steps=2, stable_steps=5, decay_steps=4, peak_lr=1.0),
    ],
    ids=str,
)
def test_an_extension_is_carried_over_to_the_schedule_of_the_resumed_run(backend: str, schedule: WSD) -> None:
    optimizer = make(WSD(warmup_steps=0, stable_steps=5, decay_steps=10, peak_lr=1.0), backend)
    optimizer.extend_stable(3)
    optimizer.extend_stable(1)
    rates(optimizer, 2)
    assert rates(resumed(optimizer, schedule), 70) == schedule.extend_stable(4).values(2, 72)


@pytest.mark.parametrize("decay", WSD_DECAYS)
def test_every_decay_can_be_put_off_and_begun_by_hand(backend: str, decay: str) -> None:
    schedule = WSD(
        warmup_steps=4, stable_steps=5, decay_steps=10, peak_lr=1.0, min_lr=0.125, decay_type=decay, decay_power=1.5
    )
    for now in (3, 7):  # in the warm-up and after it
        optimizer = make(schedule, backend)
        optimizer.extend_stable(20)
        rates(optimizer, now)
        optimizer.begin_decay()
        expected = schedule.extend_stable(20).begin_decay(now)
        assert rates(resumed(optimizer, schedule), 13) == pytest.approx(expected.values(now, now + 13), rel=1e-14)
        assert rates(optimizer, 13) == pytest.approx(expected.values(now, now + 13), rel=1e-14)


def test_a_decay_power_is_saved_and_another_one_is_named(backend: str) -> None:
    plain, steep = (
        WSD(
            warmup_steps=0,
            stable_steps=5,
            decay_steps=10,
            peak_lr=1.0,
            min_lr=0.0,
            decay_type="polynomial",
            decay_power=power,
        )
        for power in (2.0, 4.0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(plain, backend).load_state_dict(make(plain, backend).state_dict())
        make(steep, backend).load_state_dict(make(steep, backend).state_dict())
    for now, before in ((plain, steep), (steep, plain)):
        words = f"lr_schedule.decay_power was {before.decay_power} .* and is {now.decay_power} now"
        with pytest.warns(UserWarning, match=words):
            make(now, backend).load_state_dict(make(before, backend).state_dict())


def test_an_extension_that_float32_would_round_is_exact(backend: str) -> None:
    optimizer = make(WSD(warmup_steps=0, stable_steps=5, decay_steps=10, peak_lr=1.0), backend)
    optimizer.extend_stable(2**24 + 1)
    assert optimizer.state_dict()["param_groups"][0]["lr_schedule"]["edits"]["extended"] == 2**24 + 1


def test_an_extension_and_an_early_decay_are_both_carried_over(backend: str) -> None:
    schedule = WSD(warmup_steps=0, stable_steps=5, decay_steps=10, peak_lr=1.0)
    optimizer = make(schedule, backend)
    optimizer.extend_stable(20)
    rates(optimizer, 7)
    optimizer.begin_decay()
    expected = schedule.extend_stable(20).begin_decay(7).values(7, 20)
    assert rates(resumed(resumed(optimizer, schedule), schedule), 13) == expected


def test_a_group_without_edits_does_not_undo_those_of_another(backend: str) -> None:
    schedule = WSD(warmup_steps=0, stable_steps=10, decay_steps=10, peak_lr=1.0)
    params = make_params([(3,), (3,)])
    optimizer = FusedAdamW(
        [{"params": params[:1], "lr": schedule}, {"params": params[1:], "lr": 0.1}], backend=backend
    )
    rates(optimizer, 2)
    optimizer.begin_decay()
    rates(optimizer, 1)
    other = FusedAdamW([{"params": [param]} for param in make_params([(3,), (3,)])], lr=schedule, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert rates(other, 5) == schedule.begin_decay(2).values(3, 8)


def test_an_equal_schedule_that_is_assigned_anew_is_as_it_was_given(backend: str) -> None:
    schedule = WSD(warmup_steps=0, stable_steps=100, decay_steps=10, peak_lr=1.0)
    optimizer = make(schedule, backend)
    rates(optimizer, 2)
    optimizer.begin_decay()
    assert rates(optimizer, 3) == schedule.begin_decay(2).values(2, 5)
    optimizer.param_groups[0]["lr"] = WSD(warmup_steps=0, stable_steps=100, decay_steps=10, peak_lr=1.0)
    assert rates(optimizer, 2) == [1.0, 1.0]
    for peak in range(2, 30):
        optimizer.param_groups[0]["lr"] = WSD(warmup_steps=0, stable_steps=100, decay_steps=10, peak_lr=float(peak))
        assert rates(optimizer, 1) == [float(peak)]
    assert len(engine_of(optimizer).tables) == 1


def test_a_schedule_that_waits_for_its_first_step_is_saved(backend: str) -> None:
    optimizer = make(0.1, backend)
    optimizer.param_groups[0]["lr"] = WSD(warmup_steps=0, stable_steps=5, decay_steps=10, peak_lr=1.0)
    assert optimizer.state_dict()["param_groups"][0]["lr_schedule"]["type"] == "WSD"


def test_a_failed_change_of_settings_is_not_stepped_over() -> None:
    params = make_params([(3,), (4,)])
    optimizer = FusedAdamW([{"params": [param]} for param in params], lr=0.1, backend="native")
    rates(optimizer, 1)
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[1]["lr"] = torch.sparse_coo_tensor([[0]], [0.1], (1,), check_invariants=True)
    for _ in range(3):
        with pytest.raises(ValueError, match="lr as a tensor"):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    optimizer.param_groups[1]["lr"] = 0.2
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_sharing_that_begins_with_a_change_of_settings_is_seen() -> None:
    params = make_params([(8,), (8,)])
    optimizer = FusedAdamW(params, lr=0.1, backend="native")
    rates(optimizer, 1)
    params[0].data = params[1].data
    optimizer.param_groups[0]["weight_decay"] = 0.5
    set_grads(params, make_grads(params))
    with pytest.raises(ValueError, match="share"):
        optimizer.step()


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_a_tensor_rate_out_of_range_is_refused(backend: str, rate: float) -> None:
    with pytest.raises(ValueError, match="lr must be a finite number"):
        FusedAdamW(make_params([(3,)]), lr=torch.tensor(rate, device="cpu"), backend=backend)


UP, DOWN = Linear(start_lr=0.0, end_lr=1.0, total_steps=4), Linear(start_lr=1.0, end_lr=0.0, total_steps=4)
LONG = Piecewise([(i, float(i)) for i in range(100)])


@pytest.mark.parametrize(
    ("now", "before", "notes"),
    [
        (UP.warmup(3), UP.warmup(3), []),
        (UP.warmup(3), UP.warmup(5), ["lr.steps was 5 in the checkpoint and is 3 now"]),
        (UP.warmup(3), (2.0 * UP).warmup(3), ["lr.schedule.end_lr was 2.0 in the checkpoint and is 1.0 now"]),
        (
            Constant(1.0).warmup(3),
            UP.warmup(3),
            [f"lr.schedule was {UP!r} in the checkpoint and is Constant(lr=1.0) now"],
        ),
        (
            join([UP, DOWN.repeat(3)], [4]),
            join([UP, DOWN.repeat(2)], [3]),
            [
                "lr.schedules[1].n was 2 in the checkpoint and is 3 now",
                "lr.boundaries was (3,) in the checkpoint and is (4,) now",
            ],
        ),
        (
            join([UP], []),
            join([UP, DOWN], [4]),
            [
                f"lr.schedules was ({UP!r}, {DOWN!r}) in the checkpoint and is ({UP!r},) now",
                "lr.boundaries was (4,) in the checkpoint and is () now",
            ],
        ),
        (
            LONG.warmup(3),
            UP.warmup(3),
            [f"lr.schedule was {UP!r} in the checkpoint and is {repr(LONG)[:58]}...{repr(LONG)[-59:]} now"],
        ),
    ],
)
def test_differences_of_compositions_are_told_as_code(now: Schedule, before: Schedule, notes: list[str]) -> None:
    found = differences("lr", now.to_dict(), before.to_dict())
    assert found == [f"{note}; the run goes on with the latter" for note in notes]
