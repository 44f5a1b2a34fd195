"""FusedAdamW under Hugging Face accelerate, in one process and in two: updates, skipped steps, resuming, example."""

from __future__ import annotations

import math
import os
import re
import runpy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import SCHEDULE, batch, loss_of, make_net, same_on_all_ranks
from low_memory_cases import IN_TRAINERS, stored_dtypes
from references import assert_same_run, same_bits, snapshot
from torch import Tensor
from torch.distributed.tensor import DTensor
from worlds import in_processes, launch

from nexus.backends.sharding import local
from nexus.optim import FusedAdamW
from nexus.training.schedulers import WSDScheduler

pytest.importorskip("accelerate")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType
from accelerate_cases import (
    RATES,
    ROWS,
    UPDATES,
    Run,
    accelerator_with_a_scaler,
    assert_trained,
    fresh_accelerate,
    in_this_world,
    make_optimizer,
)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "with_accelerate.py"


@pytest.fixture(autouse=True)
def _on_a_fresh_accelerate() -> Iterator[None]:
    with fresh_accelerate():
        yield


# One loop, prepared.


@pytest.mark.parametrize(
    ("driver", "accumulated", "clips"),
    [
        ("inside", 1, "accelerate's"),
        ("inside", 3, "ours"),
        ("nexus", 1, "ours"),
        ("nexus", 3, "accelerate's"),
        ("torch", 3, "ours"),
    ],
)
def test_a_prepared_loop_trains_as_float64_torch(driver: str, accumulated: int, clips: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    run = Run(accelerator, driver, torch.float64, rows=ROWS // accumulated, clips=clips)
    assert isinstance(run.optimizer, AcceleratedOptimizer)
    assert run.train() == RATES  # once for each update, however many backward passes
    assert_trained(run.model)


def test_a_scheduler_over_the_prepared_optimizer_works_too() -> None:
    run = Run(Accelerator(cpu=True), "nothing", torch.float64)
    scheduler = WSDScheduler(
        run.optimizer,
        warmup_steps=5,
        stable_steps=10,
        decay_steps=15,
        peak_lr=SCHEDULE.peak_lr,
        min_lr=SCHEDULE.min_lr,
    )
    run.scheduler = run.accelerator.prepare(scheduler)
    assert run.train() == RATES
    assert_trained(run.model)


def test_preparing_an_optimizer_in_mid_run_changes_nothing() -> None:
    model, x = make_net(), batch(0)[0]
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


@pytest.mark.parametrize("driver", ["inside", "nexus"])
def test_under_bf16_the_update_is_that_of_float64_on_the_same_gradients(driver: str) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    run = Run(accelerator, driver, rows=ROWS // 2)
    seen: list[torch.dtype] = []
    run.model.second.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run.train()
    assert set(seen) == {torch.bfloat16}
    assert run.reference.completed == UPDATES
    assert_same_run(run.own, run.reference)


# float16 with a scaler.

OVERFLOWS = (0, 6, 7, 20)


@pytest.mark.parametrize(
    ("driver", "accumulated", "clips"),
    [
        ("inside", 1, "ours"),
        ("inside", 2, "accelerate's"),
        ("nexus", 1, "accelerate's"),
        ("nexus", 2, "ours"),
        ("torch", 1, "ours"),
    ],
)
def test_an_overflow_skips_update_and_schedule_and_accelerate_knows(
    driver: str, accumulated: int, clips: str
) -> None:
    accelerator = accelerator_with_a_scaler(gradient_accumulation_steps=accumulated)
    run = Run(accelerator, driver, rows=ROWS // accumulated, clips=clips)
    skipped, before, scale = [], snapshot(run.own), accelerator.scaler.get_scale()
    for overflowed in run.updates(overflows=OVERFLOWS):
        skipped.append(run.optimizer.step_was_skipped)
        assert skipped[-1] == accelerator.optimizer_step_was_skipped == overflowed
        assert same_bits(snapshot(run.own), before) == overflowed
        assert (accelerator.scaler.get_scale() < scale) == overflowed
        updates = run.reference.completed
        if run.scheduler is not None:
            assert run.scheduler.scheduler.last_epoch == updates
        next_rate = SCHEDULE(updates if run.scheduler is not None else max(updates - 1, 0))
        assert float(run.own.param_groups[0]["lr"]) == next_rate
        before, scale = snapshot(run.own), accelerator.scaler.get_scale()
    assert [update for update, skip in enumerate(skipped) if skip] == list(OVERFLOWS)
    assert run.own.skipped_steps.item() == 0  # it was not called
    assert_same_run(run.own, run.reference)


def test_without_accelerate_the_step_itself_unscales_and_skips_as_before() -> None:
    """Also once a prepared optimizer has stepped, and is used by itself again."""
    run = Run(accelerator_with_a_scaler(), "inside")
    next(run.updates())
    x, y = batch(0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(run.model, x * 1e6, y)).backward()
    before = snapshot(run.own)
    scaler.step(run.own)
    assert run.own.skipped_steps.item() == 1
    assert same_bits(snapshot(run.own), before)


def test_float16_gradients_which_gradscaler_refuses_to_unscale_are_unscaled_by_the_step() -> None:
    """As with torch's fused AdamW, accelerate then takes a skipped step for one that was made."""
    run = Run(accelerator_with_a_scaler(), "inside", torch.float16, updates=8)
    for _ in run.updates(overflows=[3]):
        assert not run.optimizer.step_was_skipped
    assert run.reference.completed == 7
    assert run.own.skipped_steps.item() == 1
    assert float(run.own.param_groups[0]["lr"]) == SCHEDULE(6)
    assert_same_run(run.own, run.reference)


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
    def begin() -> Run:
        options = {"gradient_accumulation_steps": 2}
        accelerator = accelerator_with_a_scaler(**options) if scaled else Accelerator(cpu=True, **options)
        return Run(accelerator, driver, rows=ROWS // 2, amsgrad=True)

    stop = 2 * 9  # before the decay that the schedule has by itself
    first = begin()
    batches = [tuple(part.clone() for part in pair) for pair in first.loader]
    first.train(batches[:stop])
    if decays:
        (first.own if first.scheduler is None else first.scheduler.scheduler).begin_decay()
        first.train(batches[stop : stop + 4])
        stop += 4
    first.accelerator.save_state(str(tmp_path))
    rates = first.train(batches[stop:])
    with fresh_accelerate():
        second = begin()
        second.accelerator.load_state(str(tmp_path))
        assert second.train(second.accelerator.skip_first_batches(second.loader, stop)) == rates
    if decays:
        assert len(rates) == UPDATES - stop // 2
        assert rates[0] < SCHEDULE.peak_lr == SCHEDULE(stop // 2)
    else:
        assert rates == RATES[stop // 2 :]
    assert same_bits(snapshot(first.own), snapshot(second.own))
    if scaled:
        assert first.accelerator.scaler.state_dict() == second.accelerator.scaler.state_dict()


class Low:
    """A prepared loop over weights that are stored in fewer bits."""

    def __init__(self, accelerator: Accelerator, dtype: torch.dtype, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)).to(dtype)
        self.optimizer = FusedAdamW(model.parameters(), lr=SCHEDULE, **options)
        self.accelerator = accelerator
        self.model, self.prepared = accelerator.prepare(model, self.optimizer)

    def train(self, steps: Iterable[int]) -> list[Tensor]:
        """What it has, parameters and state, after these steps."""
        for step in steps:
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            self.accelerator.backward(self.model(x.to(next(self.model.parameters()).dtype)).square().mean())
            self.prepared.step()
            self.prepared.zero_grad()
        return [local(each) for each in snapshot(self.optimizer)]


def assert_low_memory_state_is_resumed(
    begin: Callable[[], Accelerator], folder: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    first = Low(begin(), dtype, options)
    first.train(range(5))
    first.accelerator.save_state(folder)
    expected = first.train(range(5, 9))
    assert {each.dtype for each in expected} >= {dtype, *stored_dtypes(options)}
    second = Low(begin(), dtype, options)
    second.train(range(20, 22))
    second.accelerator.load_state(folder)
    assert same_bits(second.train(range(5, 9)), expected)


@pytest.mark.parametrize(("dtype", "options"), IN_TRAINERS)
def test_low_memory_state_is_resumed_bit_for_bit(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    mixed = "bf16" if dtype == torch.float32 else "no"
    assert_low_memory_state_is_resumed(
        lambda: Accelerator(cpu=True, mixed_precision=mixed), str(tmp_path), dtype, options
    )


# Two processes.


@pytest.mark.parametrize(
    ("driver", "lengthened", "splits"),
    [("inside", 1, False), ("nexus", 2, False), ("nexus", 1, True)],
    ids=["no scheduler", "a scheduler's step for each process", "one, since batches are split"],
)
@in_processes(2)
@in_this_world()
def test_two_processes_train_as_one(driver: str, lengthened: int, splits: bool) -> None:
    options: dict[str, Any] = {"dataloader_config": DataLoaderConfiguration(split_batches=True)} if splits else {}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3, **options)
    assert accelerator.num_processes == 2
    rows = (ROWS if splits else ROWS // 2) // 3
    run = Run(accelerator, driver, torch.float64, rows=rows, lengthened=lengthened)
    assert run.train() == RATES
    if run.scheduler is not None:
        assert run.scheduler.scheduler.last_epoch == lengthened * UPDATES
    assert_trained(run.model)
    assert same_on_all_ranks(run.own.grad_norm, *run.model.parameters())


@in_processes(2)
@in_this_world()
def test_what_overflows_in_one_process_is_skipped_in_both() -> None:
    run = Run(accelerator_with_a_scaler(), "nexus", rows=ROWS // 2, lengthened=2, updates=10)
    for overflowed in run.updates(overflows=(2, 5) if dist.get_rank() == 1 else ()):
        assert run.accelerator.optimizer_step_was_skipped == overflowed
        assert run.scheduler.scheduler.last_epoch == 2 * run.reference.completed
    assert run.reference.completed == 8
    assert_same_run(run.own, run.reference)
    assert same_on_all_ranks(*snapshot(run.own))


def fsdp2_accelerator() -> Accelerator:
    """Accelerate swaps parameters for shards on GPUs alone. What it sets there does its work on the CPU as well."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=10,
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
    )
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    assert accelerator.is_fsdp2
    return accelerator


@pytest.mark.parametrize(("driver", "scaled"), [("inside", False), ("nexus", True)])
@in_processes(2)
@in_this_world()
def test_fsdp2_by_accelerate_trains_as_one_process(driver: str, scaled: bool) -> None:
    accelerator = fsdp2_accelerator()
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # in float64 a power of 2 is exact
    run = Run(accelerator, driver, torch.float64, rows=ROWS // 2, lengthened=2)
    assert {type(param) for group in run.own.param_groups for param in group["params"]} == {DTensor}
    batches = list(run.loader)
    if scaled:  # as many overflows as updates, each followed by its batch once more
        overflow = [(x * (math.inf if dist.get_rank() == 1 else 1.0), y) for x, y in batches]
        batches = [each for pair in zip(overflow, batches, strict=True) for each in pair]
    skipped = [accelerator.optimizer_step_was_skipped for _ in run.updates(batches)]
    assert skipped == ([True, False] * UPDATES if scaled else [False] * UPDATES)
    assert run.rates == RATES
    assert_trained(run.model)


@pytest.mark.parametrize(("dtype", "options"), IN_TRAINERS)
@in_processes(2)
@in_this_world()
def test_low_memory_state_in_shards_is_resumed_bit_for_bit(
    dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    assert_low_memory_state_is_resumed(fsdp2_accelerator, str(tmp_path), dtype, options)


# The example.


def losses_in(printed: str) -> list[float]:
    steps, losses = zip(*re.findall(r"^step (\d+): loss (\d\.\d{4})$", printed, re.MULTILINE), strict=True)
    assert steps == ("50", "100", "150", "200", "250", "300")
    return [float(loss) for loss in losses]


LOSSES = losses_in((ROOT / "docs" / "trainers" / "accelerate.md").read_text("utf-8"))


@pytest.mark.usefixtures("restored_threads")
def test_the_example_prints_the_losses_of_the_plain_loop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(1)
    found = runpy.run_path(str(EXAMPLE))["losses"]
    assert losses_in(capsys.readouterr().out) == pytest.approx(found, abs=1e-4)
    plain = runpy.run_path(str(EXAMPLE.with_name("nexus_eager.py")))["losses"]
    assert found == plain  # the same batches, and the same operations
    assert pytest.approx(found, rel=0.2) == LOSSES  # as tests/project/test_examples.py has it, of other machines
    assert EXAMPLE.read_text("utf-8").count("\n") < 50


def test_accelerate_launches_the_example_on_two_processes(tmp_path: Path) -> None:
    arguments = ["--cpu", "--num_processes", "2", str(EXAMPLE)]
    printed = launch(tmp_path / "printed", "accelerate.commands.launch", *arguments)
    assert losses_in(printed) == pytest.approx(LOSSES, rel=0.2)
