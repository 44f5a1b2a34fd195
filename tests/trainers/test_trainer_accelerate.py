"""FusedAdamW under Hugging Face accelerate: updates, skipped steps, resuming and logs, in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import SCHEDULE, batch, loss_of
from references import Float64AdamW, assert_same_run, same_bits, snapshot

from nexus.optim import FusedAdamW
from nexus.training.schedulers import WSDScheduler

pytest.importorskip("accelerate")

from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate_cases import (
    DECAY,
    DRIVERS,
    ROWS,
    UPDATES,
    accelerator_with_a_scaler,
    assert_trained,
    fresh_accelerate,
    make_loader,
    make_model,
    make_optimizer,
    prepare,
    train,
    trained_without,
)


@pytest.fixture(autouse=True)
def _on_a_fresh_accelerate() -> Iterator[None]:
    with fresh_accelerate():
        yield


# One loop, prepared.


@pytest.mark.parametrize(
    ("driver", "accumulated", "clip"),
    [
        ("inside", 1, "accelerate's"),
        ("inside", 3, "ours"),
        ("nexus", 1, "ours"),
        ("nexus", 3, "accelerate's"),
        ("torch", 3, "ours"),
    ],
)
def test_a_prepared_loop_trains_as_float64_torch(driver: str, accumulated: int, clip: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    model = make_model(torch.float64)
    own, scheduler = make_optimizer(model, driver, max_grad_norm=0.7 if clip == "ours" else None)
    loader = make_loader(ROWS // accumulated, torch.float64)
    model, optimizer, loader, scheduler = prepare(accelerator, model, own, loader, scheduler)
    assert isinstance(optimizer, AcceleratedOptimizer)
    rates = train(accelerator, model, optimizer, loader, scheduler, None if clip == "ours" else 0.7)
    assert rates == [SCHEDULE(t) for t in range(UPDATES)]  # once for each update, however many backward passes
    assert_trained(model, trained_without(0.7))


def test_a_scheduler_over_the_prepared_optimizer_works_too() -> None:
    accelerator = Accelerator(cpu=True)
    model = make_model(torch.float64)
    model, optimizer, loader = accelerator.prepare(
        model, FusedAdamW(model.parameters(), lr=1.0, weight_decay=DECAY), make_loader(ROWS, torch.float64)
    )
    scheduler = accelerator.prepare(WSDScheduler(optimizer, 5, 10, 15, SCHEDULE.peak_lr, SCHEDULE.min_lr))
    assert train(accelerator, model, optimizer, loader, scheduler) == [SCHEDULE(t) for t in range(UPDATES)]
    assert_trained(model, trained_without(None))


def test_preparing_an_optimizer_in_mid_run_changes_nothing() -> None:
    model, x = make_model(torch.float32), batch(0)[0]
    optimizer, _ = make_optimizer(model, "inside")
    for step in range(9):
        if step == 7:
            optimizer.begin_decay()
        model(x).square().mean().backward()
        optimizer.step()
    before, rate = snapshot(optimizer), float(optimizer.param_groups[0]["lr"])
    Accelerator(cpu=True).prepare(model, optimizer)
    assert same_bits(snapshot(optimizer), before)
    assert float(optimizer.param_groups[0]["lr"]) == rate
    optimizer.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(SCHEDULE.begin_decay(7)(9), rel=1e-15)


def feed(optimizer: FusedAdamW, reference: Float64AdamW) -> None:
    """Let the reference see the gradients of every step that the optimizer makes."""

    def step(*_: Any) -> None:
        reference.step([param.grad for group in optimizer.param_groups for param in group["params"]])

    optimizer.register_step_pre_hook(step)


@pytest.mark.parametrize("driver", ["inside", "nexus"])
def test_under_bf16_the_update_is_that_of_float64_on_the_same_gradients(driver: str) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = make_model(torch.float32)
    own, scheduler = make_optimizer(model, driver, max_grad_norm=0.7)
    reference = Float64AdamW(list(model.parameters()), lr=SCHEDULE, weight_decay=DECAY, max_grad_norm=0.7)
    feed(own, reference)
    seen: list[torch.dtype] = []
    model.second.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    loader = make_loader(ROWS // 2, torch.float32)
    model, optimizer, loader, scheduler = prepare(accelerator, model, own, loader, scheduler)
    train(accelerator, model, optimizer, loader, scheduler)
    assert set(seen) == {torch.bfloat16}
    assert reference.completed == UPDATES
    assert_same_run(own, reference)


# float16 with a scaler.


OVERFLOWS = (0, 6, 7, 20)


@pytest.mark.parametrize(
    ("driver", "accumulated", "clip"),
    [
        ("inside", 1, "ours"),
        ("inside", 2, "accelerate's"),
        ("nexus", 1, "accelerate's"),
        ("nexus", 2, "ours"),
        ("torch", 1, "ours"),
    ],
)
def test_an_overflow_skips_update_and_schedule_and_accelerate_knows(driver: str, accumulated: int, clip: str) -> None:
    accelerator = accelerator_with_a_scaler(gradient_accumulation_steps=accumulated)
    model = make_model(torch.float32)
    own, scheduler = make_optimizer(model, driver, max_grad_norm=0.7 if clip == "ours" else None)
    reference = Float64AdamW(list(model.parameters()), lr=SCHEDULE, weight_decay=DECAY, max_grad_norm=0.7)
    loader = make_loader(ROWS // accumulated, torch.float32)
    model, optimizer, loader, scheduler = prepare(accelerator, model, own, loader, scheduler)
    updates, skipped, scale = 0, [], 2.0**10
    for i, (x, y) in enumerate(loader):
        update, last = divmod(i, accumulated)
        with accelerator.accumulate(model):
            overflows = update in OVERFLOWS and last == accumulated - 1
            accelerator.backward(loss_of(model, x * 1e6 if overflows else x, y))
            if last == accumulated - 1:
                scale = accelerator.scaler.get_scale()
                grads = [param.grad.double() / scale for param in model.parameters()]
                assert overflows != all(bool(grad.isfinite().all()) for grad in grads)
                if clip != "ours":
                    accelerator.clip_grad_norm_(model.parameters(), 0.7)
                if not overflows:
                    reference.step(grads)
                    updates += 1
            before = snapshot(own)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
                assert scheduler.scheduler.last_epoch == updates
            optimizer.zero_grad()
        if last == accumulated - 1:
            skipped.append(optimizer.step_was_skipped)
            assert accelerator.optimizer_step_was_skipped == overflows
            assert same_bits(snapshot(own), before) == overflows
            next_rate = SCHEDULE(updates if scheduler is not None else max(updates - 1, 0))
            assert float(own.param_groups[0]["lr"]) == next_rate
            assert (accelerator.scaler.get_scale() < scale) == overflows
    assert [update for update, skip in enumerate(skipped) if skip] == list(OVERFLOWS)
    assert own.skipped_steps.item() == 0  # it was not called
    assert_same_run(own, reference)


def test_without_accelerate_the_step_itself_unscales_and_skips_as_before() -> None:
    """Also once a prepared optimizer has stepped, and is used by itself again."""
    accelerator = accelerator_with_a_scaler()
    model, (x, y) = make_model(torch.float32), batch(0)
    own, _ = make_optimizer(model, "inside")
    model, optimizer = accelerator.prepare(model, own)
    accelerator.backward(loss_of(model, x, y))
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, x * 1e6, y)).backward()
    before = snapshot(own)
    scaler.step(own)
    assert own.skipped_steps.item() == 1
    assert same_bits(snapshot(own), before)


def test_float16_gradients_which_gradscaler_refuses_to_unscale_are_unscaled_by_the_step() -> None:
    """As with torch's fused AdamW, accelerate then takes a skipped step for one that was made."""
    accelerator = accelerator_with_a_scaler()
    model, (x, y) = make_model(torch.float16), batch(0)
    own, _ = make_optimizer(model, "inside", max_grad_norm=0.7)
    reference = Float64AdamW(list(model.parameters()), lr=SCHEDULE, weight_decay=DECAY, max_grad_norm=0.7)
    model, optimizer = accelerator.prepare(model, own)
    for step in range(8):
        overflows = step == 3
        accelerator.backward(loss_of(model, x * 1e6 if overflows else x, y))
        if not overflows:
            scale = accelerator.scaler.get_scale()
            reference.step([param.grad.double() / scale for param in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        assert not optimizer.step_was_skipped
    assert own.skipped_steps.item() == 1
    assert float(own.param_groups[0]["lr"]) == SCHEDULE(6)
    assert_same_run(own, reference)


# Resuming.


@pytest.mark.parametrize(
    ("driver", "decays", "scaled"),
    [
        ("inside", False, True),
        ("inside", True, False),
        ("nexus", False, False),
        ("nexus", True, True),
        ("torch", False, True),
    ],
)
def test_a_run_resumed_by_load_state_is_the_uninterrupted_one(
    driver: str, decays: bool, scaled: bool, tmp_path: Path
) -> None:
    def begin() -> tuple[Accelerator, Any, Any, Any, Any]:
        fresh = {"gradient_accumulation_steps": 2}
        accelerator = accelerator_with_a_scaler(**fresh) if scaled else Accelerator(cpu=True, **fresh)
        model = make_model(torch.float32)
        own, scheduler = make_optimizer(model, driver, max_grad_norm=0.7, amsgrad=True)
        return accelerator, *prepare(accelerator, model, own, make_loader(ROWS // 2, torch.float32), scheduler)

    stop = 2 * 9  # before the decay that the schedule has by itself
    first = begin()
    accelerator, model, optimizer, loader, scheduler = first
    batches = [tuple(part.clone() for part in pair) for pair in loader]
    train(accelerator, model, optimizer, batches[:stop], scheduler)
    if decays:
        (optimizer.optimizer if scheduler is None else scheduler.scheduler).begin_decay()
        train(accelerator, model, optimizer, batches[stop : stop + 4], scheduler)
        stop += 4
    accelerator.save_state(str(tmp_path))
    rates = [train(accelerator, model, optimizer, batches[stop:], scheduler)]
    with fresh_accelerate():
        second = begin()
        accelerator, model, optimizer, loader, scheduler = second
        accelerator.load_state(str(tmp_path))
        rest = accelerator.skip_first_batches(loader, stop)
        rates.append(train(accelerator, model, optimizer, rest, scheduler))
    assert len(rates[0]) == UPDATES - stop // 2
    assert rates[0] == rates[1]
    if decays:
        assert rates[1][0] < SCHEDULE.peak_lr == SCHEDULE(stop // 2)
    else:
        assert rates[1] == [SCHEDULE(t) for t in range(stop // 2, UPDATES)]
    runs = [(each[1].parameters(), snapshot(each[2].optimizer)) for each in (first, second)]
    assert same_bits(list(runs[0][0]), list(runs[1][0]))
    assert same_bits(runs[0][1], runs[1][1])
    if scaled:
        assert first[0].scaler.state_dict() == second[0].scaler.state_dict()


# Logs.


class JsonLines(GeneralTracker):
    """A tracker of one's own, which takes what JSON takes."""

    name = "json"
    requires_logging_directory = False

    @on_main_process
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


@pytest.mark.parametrize("driver", DRIVERS)
def test_rates_are_logged_as_numbers(driver: str, tmp_path: Path) -> None:
    PartialState(cpu=True)  # of which trackers ask which process this is
    accelerator = Accelerator(cpu=True, log_with=JsonLines(tmp_path / "log"))
    model = make_model(torch.float32)
    own, scheduler = make_optimizer(model, driver)
    loader = make_loader(ROWS, torch.float32)
    model, optimizer, loader, scheduler = prepare(accelerator, model, own, loader, scheduler)
    accelerator.init_trackers("run")
    for t, (x, y) in enumerate(loader):
        accelerator.backward(loss_of(model, x, y))
        optimizer.step()
        rate = float(own.param_groups[0]["lr"]) if scheduler is None else scheduler.get_last_lr()[0]
        accelerator.log({"lr": rate}, step=t)
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    accelerator.end_training()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(UPDATES))
    assert [line["lr"] for line in lines] == [SCHEDULE(t) for t in range(UPDATES)]
