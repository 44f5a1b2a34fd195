"""Edits of any schedule in a live run: hold, decay, rise again, another schedule; beside the oracle, and resumed."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_on_cpu import NAME
from references import make_grads, make_params, set_grads
from torch._subclasses.fake_tensor import FakeTensorMode

from nexus.backends import reference
from nexus.optim import FusedAdamW, scheduled
from nexus.optim.engine import engine_of
from nexus.schedules import (
    WSD,
    WSDS,
    Arc,
    Clock,
    Constant,
    Cosine,
    CosineRestarts,
    Linear,
    MultiStep,
    OneCycle,
    ReduceOnPlateau,
    Schedule,
    join,
    minimum,
)
from nexus.schedules.curves import DECAYS
from nexus.schedules.pieces import FromRate, highest
from nexus.schedules.table import CAPACITY, ScheduleTable
from nexus.training import capture_train_step, step_in_backward

WAVE = Schedule.from_function(lambda t: 1.0 / (1.0 + t % 5), steps=40)
SCHEDULES: list[Schedule] = [
    Cosine(peak_lr=1.0, total_steps=30, min_lr=0.1, warmup_steps=5),
    CosineRestarts(peak_lr=1.0, min_lr=0.1, cycle_length=4, cycle_mult=1.5, warmup_steps=2),
    WSD(warmup_steps=3, stable_steps=10, decay_steps=8, peak_lr=1.0, min_lr=0.1),
    WSDS(warmup_steps=3, cycle_length=6, decay_steps=2, peak_lr=1.0),
    Linear(start_lr=0.1, end_lr=1.0, total_steps=20) * Cosine(peak_lr=1.0, total_steps=30, min_lr=0.5)
    + Constant(0.1),
    WAVE,
    Constant(0.5),
]
Edit = Callable[[FusedAdamW], None]
# An edit, and what it puts in force where the rate is that.
EDITS: dict[str, tuple[Edit, Callable[[float], Schedule]]] = {
    "hold": (lambda o: o.hold(), Constant),
    "linear": (lambda o: o.begin_decay(4), lambda rate: Arc("linear", high=rate, low=0.0, span=4.0)),
    "cosine": (
        lambda o: o.begin_decay(6, kind="cosine", to=0.25),
        lambda rate: join([Arc("cosine", high=rate, low=0.25, span=6.0), Constant(0.25)], [6]),
    ),
    "sqrt": (lambda o: o.begin_decay(5, kind="sqrt"), lambda rate: Arc("sqrt", high=rate, low=0.0, span=5.0)),
    "rewarm": (lambda o: o.rewarm(4, to=2.0), lambda rate: Arc("linear", high=rate, low=2.0, span=4.0)),
    "replace": (
        lambda o: o.replace(OneCycle(peak_lr=0.75, total_steps=9)),
        lambda rate: OneCycle(peak_lr=0.75, total_steps=9),
    ),
    "restarts": (
        lambda o: o.replace(WSDS(warmup_steps=0, cycle_length=3, decay_steps=2, peak_lr=0.5)),
        lambda rate: WSDS(warmup_steps=0, cycle_length=3, decay_steps=2, peak_lr=0.5),
    ),
    "fold": (
        lambda o: o.replace(minimum(WAVE, Linear(start_lr=0, end_lr=2, total_steps=8))),
        lambda rate: minimum(WAVE, Linear(start_lr=0, end_lr=2, total_steps=8)),
    ),
}


def make(lr: Any, backend: str = "auto") -> FusedAdamW:
    return FusedAdamW(make_params([(3,)]), lr=lr, backend=backend)


def rates(optimizer: FusedAdamW, steps: int) -> list[float]:
    """The rates that the next updates use."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    used = []
    for _ in range(steps):
        set_grads(params, make_grads(params))
        optimizer.step()
        used.append(float(optimizer.param_groups[0]["lr"]))
    return used


def resumed(optimizer: FusedAdamW, schedule: Schedule) -> FusedAdamW:
    other = make(schedule, optimizer.backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = optimizer.state_dict()
        group = saved["param_groups"][0]
        saved["param_groups"] = [{**group, "lr_schedule": json.loads(json.dumps(group["lr_schedule"]))}]
        other.load_state_dict(saved)
    return other


def assert_rates(used: list[float], expected: list[float], optimizer: FusedAdamW) -> None:
    if optimizer.backend in ("native", NAME):
        assert used == expected
    else:  # the cosine is another library's
        assert used == pytest.approx(expected, rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_the_oracles(backend: str, name: str, schedule: Schedule) -> None:
    edit, piece_of = EDITS[name]
    optimizer = make(schedule, backend)
    assert_rates(rates(optimizer, 7), schedule.values(0, 7), optimizer)
    edit(optimizer)
    rows = [table.rows.data_ptr() for table in engine_of(optimizer).tables.values()]
    expected = piece_of(schedule(7)).values(0, 20)
    assert_rates(rates(optimizer, 10), expected[:10], optimizer)
    assert_rates(rates(resumed(optimizer, schedule), 10), expected[10:], optimizer)
    assert rows == [table.rows.data_ptr() for table in engine_of(optimizer).tables.values()]
    assert_rates(schedule.values(0, 7) + expected, optimizer.schedule.values(0, 27), optimizer)


def test_edits_follow_one_another_and_copies_go_on(backend: str) -> None:
    schedule = Cosine(peak_lr=1.0, total_steps=30, min_lr=0.1, warmup_steps=5)
    optimizer = make(schedule, backend)
    used = []
    for name in EDITS:
        used += rates(optimizer, 3)
        EDITS[name][0](optimizer)
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), resumed(optimizer, schedule)]
    used += rates(optimizer, 9)
    for other in others:
        assert rates(other, 9) == used[-9:]
        assert other.schedule == optimizer.schedule
    assert_rates(used, optimizer.schedule.values(0, len(used)), optimizer)


def test_two_edits_at_the_same_step_and_one_at_the_start(backend: str) -> None:
    optimizer = make(Linear(start_lr=1.0, end_lr=0.0, total_steps=10), backend)
    optimizer.hold()
    optimizer.begin_decay(4)
    assert rates(optimizer, 5) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert optimizer.schedule.values(0, 5) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_an_edit_late_in_a_run_is_exact(backend: str) -> None:
    optimizer = make(Constant(1.0), backend)
    for state in engine_of(optimizer).states.values():
        state.completed.fill_(2**53 - 20)
    optimizer.begin_decay(8)
    assert rates(optimizer, 9) == [1 - t / 8 for t in range(9)]


def test_rewarm_rises_to_the_highest_rate_of_the_schedule_given_last(backend: str) -> None:
    optimizer = make(Linear(start_lr=0.8, end_lr=0.0, total_steps=10), backend)
    rates(optimizer, 5)
    optimizer.rewarm(2)
    assert rates(optimizer, 3) == pytest.approx([0.4, 0.6, 0.8])
    optimizer.replace(Linear(start_lr=0.5, end_lr=0.0, total_steps=4))
    rates(optimizer, 4)
    optimizer = resumed(optimizer, Linear(start_lr=0.8, end_lr=0.0, total_steps=10))
    optimizer.rewarm(2)
    assert rates(optimizer, 3) == pytest.approx([0.0, 0.25, 0.5])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: type(each).__name__)
def test_the_highest_rate_is_reached_and_none_is_higher(schedule: Schedule) -> None:
    assert highest(schedule) == max(schedule.values(0, 200))


def test_a_wsd_that_was_held_begins_its_own_decay_and_that_goes_on(backend: str) -> None:
    schedule = WSD(warmup_steps=2, stable_steps=4, decay_steps=4, peak_lr=1.0, min_lr=0.0, decay_type="exponential")
    optimizer = make(schedule, backend)
    rates(optimizer, 8)
    optimizer.hold()
    rate = schedule(8)
    assert_rates(rates(optimizer, 3), [rate] * 3, optimizer)
    optimizer.begin_decay()
    expected = [rate * (2.0 * 0.5 ** (t / 4) - 1.0) for t in range(4)] + [0.0]
    used = rates(optimizer, 2)
    optimizer.begin_decay()
    optimizer = resumed(optimizer, schedule)
    optimizer.begin_decay()
    assert used + rates(optimizer, 3) == pytest.approx(expected, rel=1e-14, abs=1e-16)
    with pytest.raises(RuntimeError, match=r"extend_stable is of a WSD as it was given.*hold\(\)"):
        optimizer.extend_stable(3)


def test_a_wsds_own_edits_stay_in_the_oracle(backend: str) -> None:
    schedule = WSD(warmup_steps=2, stable_steps=4, decay_steps=4, peak_lr=1.0)
    optimizer = make(schedule, backend)
    optimizer.extend_stable(3)
    assert optimizer.schedule == schedule.extend_stable(3)
    rates(optimizer, 4)
    optimizer.begin_decay()
    rates(optimizer, 2)
    optimizer.hold()
    expected = join([schedule.extend_stable(3).begin_decay(4), Constant(0.5)], [6])
    assert optimizer.schedule == expected
    assert resumed(optimizer, schedule).schedule == expected


@pytest.mark.parametrize("inner", [Constant(0.8), Cosine(peak_lr=0.8, total_steps=40, min_lr=0.4)], ids=repr)
def test_a_plateau_keeps_what_it_heard(backend: str, inner: Schedule) -> None:
    schedule = ReduceOnPlateau(inner, factor=0.5, patience=1, eps=0.0)
    optimizer = make(schedule, backend)
    for loss in (1.0, 1.0, 1.0, 1.0):  # the third is one too many
        rates(optimizer, 1)
        optimizer.report(loss)
    rate = inner(4)
    optimizer.hold()
    assert_rates(rates(optimizer, 2), [0.5 * rate] * 2, optimizer)
    optimizer.replace(Linear(start_lr=0.0, end_lr=1.0, total_steps=4))
    optimizer = resumed(optimizer, schedule)
    assert_rates(rates(optimizer, 3), [0.0, 0.125, 0.25], optimizer)
    optimizer.report(1.0)  # the second bad one
    assert_rates(rates(optimizer, 2), [0.1875, 0.25], optimizer)
    assert optimizer.schedule == ReduceOnPlateau(
        join([inner, Constant(rate), Linear(start_lr=0.0, end_lr=1.0, total_steps=4)], [4, 6]),
        factor=0.5,
        patience=1,
        eps=0.0,
    )


def test_only_groups_with_a_schedule_are_edited(backend: str) -> None:
    params = make_params([(3,), (3,), (3,)])
    lrs = [Linear(start_lr=1.0, end_lr=0.0, total_steps=4), 0.25, Cosine(peak_lr=1.0, total_steps=4)]
    groups = [{"params": [param], "lr": lr} for param, lr in zip(params, lrs, strict=True)]
    optimizer = FusedAdamW(groups, backend=backend, weight_decay=Linear(start_lr=0.5, end_lr=0.0, total_steps=4))
    rates(optimizer, 2)
    optimizer.hold()
    rates(optimizer, 2)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.5, 0.25, 0.5])
    assert [float(group["weight_decay"]) for group in optimizer.param_groups] == [0.125] * 3
    held = [join([lrs[0], Constant(0.5)], [2]), None]
    assert optimizer.schedules[:2] == held
    with pytest.raises(RuntimeError, match=r"share no schedule: see optimizer\.schedules"):
        optimizer.schedule  # noqa: B018


def test_a_schedule_that_is_assigned_is_not_edited(backend: str) -> None:
    optimizer = make(Linear(start_lr=1.0, end_lr=0.0, total_steps=4), backend)
    optimizer.hold()
    optimizer.param_groups[0]["lr"] = Linear(start_lr=1.0, end_lr=0.0, total_steps=4)
    assert rates(optimizer, 2) == [1.0, 0.75]
    assert optimizer.schedule == Linear(start_lr=1.0, end_lr=0.0, total_steps=4)


@pytest.mark.parametrize("backend", [NAME, "triton"])
@pytest.mark.parametrize("plateau", [False, True])
def test_graphs_see_edits(graphs: Any, backend: str, plateau: bool) -> None:
    edits = dict(zip((4, 6, 8, 11, 13, 17), (EDITS[name][0] for name in EDITS if name != "sqrt"), strict=False))
    edits[19] = EDITS["fold"][0]
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        inner = Cosine(peak_lr=0.1, total_steps=30)
        lr = ReduceOnPlateau(inner, factor=0.5, patience=2) if plateau else inner
        optimizer = FusedAdamW(model.parameters(), lr=lr, backend=backend)

        def train_step(x: torch.Tensor, model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            if plateau:
                optimizer.report(loss)
            return loss

        call = capture_train_step(train_step, optimizer) if captured else train_step
        generator = torch.Generator().manual_seed(1)
        used = []
        for t in range(24):
            edits.get(t, lambda o: None)(optimizer)
            call(torch.randn(6, 4, generator=generator))
            used.append(float(optimizer.param_groups[0]["lr"]))
        if captured:
            assert graphs.events.count("capture") == 1
        ends.append([used, optimizer.schedule, *map(torch.Tensor.tolist, model.parameters())])
    assert ends[0] == ends[1]
    assert len(set(ends[0][0])) > 12


def test_steps_in_the_backward_pass_see_edits(backend: str) -> None:
    ends = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        optimizer = FusedAdamW(model.parameters(), lr=Cosine(peak_lr=0.1, total_steps=30), backend=backend)
        if in_backward:
            step_in_backward(model, optimizer)
        for t in range(9):
            if t == 3:
                optimizer.replace(
                    minimum(
                        Linear(start_lr=0.0, end_lr=0.1, total_steps=2),
                        Constant(0.05) * Linear(start_lr=0.5, end_lr=1.0, total_steps=8),
                    )
                )
            if t == 6:
                optimizer.hold()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([param.tolist() for param in model.parameters()])
    assert ends[0] == ends[1]


def test_evaluators_read_no_row_that_is_not_in_force(backend: str) -> None:
    for schedule in [*SCHEDULES, ReduceOnPlateau(Cosine(peak_lr=1.0, total_steps=30))]:
        optimizer = make(schedule, backend)
        optimizer.rewarm(9)  # of one layer, whatever there was before
        (table,) = engine_of(optimizer).tables.values()
        for layer in table.rows:
            layer[1 + int(layer[0, 1]) :] = torch.nan
        if not table.is_plateau:
            table._memory[len(table.rows) :] = torch.nan
        first = schedule(0)
        expected = [first + t / 9 * (highest(schedule) - first) for t in range(9)]
        assert rates(optimizer, 9) == pytest.approx(expected, rel=1e-14)


def test_a_skipped_step_moves_no_piece(backend: str) -> None:
    optimizer = FusedAdamW(
        make_params([(3,)]), lr=Linear(start_lr=1.0, end_lr=0.0, total_steps=8), backend=backend, skip_nonfinite=True
    )
    rates(optimizer, 2)
    optimizer.begin_decay(3)
    used = []
    for bad in (False, True, False, True, False):
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = torch.full_like(param, torch.nan if bad else 1.0)
        optimizer.step()
        used.append(float(optimizer.param_groups[0]["lr"]))
    assert used == pytest.approx([0.75, 0.75, 0.5, 0.5, 0.25])


def test_a_table_follows_another_one() -> None:
    schedule = ReduceOnPlateau(Constant(0.5), patience=0)
    tables = [ScheduleTable(schedule, torch.device("cpu")) for _ in range(2)]
    now, one = torch.tensor(4), torch.tensor(1.0, dtype=torch.float64)
    tables[0].edit(Linear(start_lr=1.0, end_lr=0.0, total_steps=4), now, one)
    for _ in range(2):
        tables[0].report(one, one)
    tables[1].follow(tables[0])
    assert torch.equal(tables[1].rows, tables[0].rows)
    for each in (ScheduleTable.standing, ScheduleTable.saved_pieces, ScheduleTable.reports):
        assert each(tables[1]) == each(tables[0])
    wide = ScheduleTable(Constant(1.0), torch.device("cpu"))
    assert wide.edit(Linear(start_lr=1.0, end_lr=0.0, total_steps=4) * Constant(0.5), now, one)
    narrow = ScheduleTable(Constant(1.0), torch.device("cpu"))
    narrow.follow(wide)
    assert torch.equal(narrow.rows, wide.rows)


@pytest.mark.parametrize("backend", [NAME, "triton"])
def test_a_graph_goes_on_where_a_checkpoint_with_edits_is_loaded(graphs: Any, backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = FusedAdamW(
        model.parameters(), lr=ReduceOnPlateau(Cosine(peak_lr=0.1, total_steps=30), patience=0), backend=backend
    )

    @functools.partial(capture_train_step, optimizer=optimizer)
    def train_step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.report(loss)
        return loss

    def run(steps: int) -> list[float]:
        used = []
        for t in range(steps):
            train_step(torch.full((2, 4), 1.0 + t % 3))
            used.append(float(optimizer.param_groups[0]["lr"]))
        return used

    run(6)
    optimizer.replace(minimum(WAVE, Linear(start_lr=0.0, end_lr=0.2, total_steps=8)))
    run(2)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    expected = run(5)
    optimizer.hold()
    run(2)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert run(5) == expected
    assert graphs.events.count("capture") == 1
    assert len(set(expected)) > 3


def test_edits_read_nothing_back() -> None:
    with FakeTensorMode():
        table = ScheduleTable(ReduceOnPlateau(Cosine(peak_lr=1.0, total_steps=5)), torch.device("cpu"))
        completed = torch.zeros((), dtype=torch.int64)
        for piece in (FromRate(), FromRate("linear", 0.5, 3), Cosine(peak_lr=2.0, total_steps=5) * Constant(0.5)):
            table.check_edit(piece)
            table.edit(piece, completed, reference.evaluate(table.of_schedule, completed))


def test_an_edit_is_no_part_of_a_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="do this anew in each replay: call this between steps"):
        scheduled._refuse_capture(torch.device("cuda"))


LONG = MultiStep(peak_lr=1.0, milestones=tuple(range(1, CAPACITY + 1)), gamma=0.5)


def test_what_does_not_fit_changes_nothing(backend: str) -> None:
    optimizer = make(Linear(start_lr=1.0, end_lr=0.0, total_steps=8), backend)
    rates(optimizer, 2)
    with pytest.raises(ValueError, match=r"takes 1 layers of 17 rows.*room for 4 layers of 16 rows.*assign it to"):
        optimizer.replace(LONG)
    plateau = make(ReduceOnPlateau(Linear(start_lr=1.0, end_lr=0.0, total_steps=8)), backend)
    with pytest.raises(ValueError, match=r"takes 4 layers.*room for 3 layers"):
        plateau.replace(
            Linear(start_lr=1.0, end_lr=0.0, total_steps=8) * Constant(1.0) * Constant(1.0) * Constant(1.0)
        )
    assert rates(optimizer, 2) == [0.75, 0.625]
    optimizer.replace(MultiStep(peak_lr=1.0, milestones=tuple(range(1, CAPACITY)), gamma=0.5))
    assert rates(optimizer, CAPACITY) == [0.5**t for t in range(CAPACITY)]


def test_saved_edits_that_do_not_fit_are_refused_before_anything_is_loaded() -> None:
    first, second = make(LONG), make(MultiStep(peak_lr=1.0, milestones=(3,), gamma=0.5))
    rates(first, 2)
    first.replace(LONG)
    before = [param.clone() for param in second.state]
    with pytest.warns(UserWarning, match="milestones"), pytest.raises(ValueError, match="room for"):
        second.load_state_dict(first.state_dict())
    assert len(before) == len(second.state) == 0


@pytest.mark.parametrize("saved", ["x", 5, "[1]", '[[-1, {"type": "Constant", "lr": 1.0}, true]]', "[[1, {}, true]]"])
def test_what_was_saved_must_be_what_is_saved(saved: Any) -> None:
    optimizer = make(Constant(1.0))
    state = optimizer.state_dict()
    state["param_groups"][0]["lr_schedule"]["pieces"] = saved
    with pytest.raises(ValueError, match=r"lr_schedule\['pieces'\] must be None or JSON"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda o: o.begin_decay(0), ValueError, "steps must be an int from 1"),
        (lambda o: o.begin_decay(2.5), TypeError, "steps must be an int from 1"),
        (lambda o: o.begin_decay(5, kind="exponential"), ValueError, f"kind must be one of .*{next(iter(DECAYS))}"),
        (lambda o: o.begin_decay(5, to=-1.0), ValueError, "to must be a finite number >= 0"),
        (lambda o: o.begin_decay(kind="cosine"), ValueError, "kind and to are of a decay with steps: give steps"),
        (lambda o: o.begin_decay(), RuntimeError, r"no parameter group has a WSD schedule.*begin_decay\(steps\)"),
        (lambda o: o.rewarm(0), ValueError, "steps must be an int from 1"),
        (lambda o: o.rewarm(3, to=float("nan")), ValueError, "to must be a finite number >= 0"),
        (lambda o: o.replace(0.1), TypeError, r"schedule must be a nexus Schedule.*Constant\(lr\)"),
        (lambda o: o.replace(ReduceOnPlateau(Constant(1.0))), TypeError, "schedule must not be a ReduceOnPlateau"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(edit: Edit, error: type[Exception], words: str) -> None:
    optimizer = make(Linear(start_lr=1.0, end_lr=0.0, total_steps=8))
    with pytest.raises(error, match=words):
        edit(optimizer)
    assert rates(optimizer, 2) == [1.0, 0.875]


@pytest.mark.parametrize("edit", [EDITS["hold"][0], EDITS["linear"][0], EDITS["rewarm"][0], EDITS["replace"][0]])
def test_without_a_schedule_there_is_none_to_edit(edit: Edit) -> None:
    with pytest.raises(RuntimeError, match="no parameter group has a schedule as lr: there is none to edit"):
        edit(make(0.1))


@pytest.mark.parametrize("plateau", [False, True])
def test_edits_take_place_at_the_count_of_a_clock(backend: str, plateau: bool) -> None:
    def make_at_tokens() -> FusedAdamW:
        inner = Linear(start_lr=1.0, end_lr=0.0, total_steps=80)
        schedule = ReduceOnPlateau(inner, factor=0.5, patience=0) if plateau else inner
        return make(schedule.at(Clock()), backend)

    def run(optimizer: FusedAdamW, steps: int) -> list[float]:
        used = []
        for _ in range(steps):
            used += rates(optimizer, 1)
            optimizer.advance(optimizer.param_groups[0]["lr_schedule"].clock, 10)
        return used

    optimizer = make_at_tokens()
    assert run(optimizer, 2) == [1.0, 0.875]
    optimizer.begin_decay(30)  # from 0.75 on
    if plateau:
        optimizer.report(1.0)
        optimizer.report(1.0)
    factor = 0.5 if plateau else 1.0
    assert run(optimizer, 2) == pytest.approx([factor * 0.75, factor * 0.5])
    other = make_at_tokens()
    other.load_state_dict(optimizer.state_dict())
    assert run(other, 2) == run(optimizer, 2) == pytest.approx([factor * 0.25, 0.0])
    assert optimizer.schedule.values(10, 21) == Linear(start_lr=1.0, end_lr=0.0, total_steps=80).values(10, 21)
    assert optimizer.schedule(35) == pytest.approx(0.375)
