"""FusedAdamW under Hugging Face accelerate in two processes, and the example, on one and on two."""

from __future__ import annotations

import contextlib
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import SCHEDULE, loss_of, same_on_all_ranks, whole
from references import Float64AdamW, assert_same_run, snapshot
from torch.distributed.tensor import DTensor
from worlds import Worlds

pytest.importorskip("accelerate")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DataLoaderConfiguration, DistributedType
from accelerate_cases import (
    DECAY,
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

pytestmark = pytest.mark.xdist_group("distributed")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "with_accelerate.py"


@pytest.fixture(autouse=True)
def _on_a_fresh_accelerate() -> Iterator[None]:
    with fresh_accelerate():
        yield


def in_this_world() -> contextlib.AbstractContextManager[None]:
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return fresh_accelerate(**names, OMP_NUM_THREADS="1")


def two_processes(driver: str, scheduler_steps: str) -> None:
    size, lengthened = ROWS // 2, 1
    options: dict[str, Any] = {"gradient_accumulation_steps": 3}
    if scheduler_steps == "once for each process":
        lengthened = 2
    elif scheduler_steps == "once, since batches are split":
        size, options["dataloader_config"] = ROWS, DataLoaderConfiguration(split_batches=True)
    with in_this_world():
        accelerator = Accelerator(cpu=True, **options)
        assert accelerator.num_processes == 2
        model = make_model(torch.float64)
        own, scheduler = make_optimizer(model, driver, lengthened=lengthened, max_grad_norm=0.7)
        loader = make_loader(size // 3, torch.float64)
        model, optimizer, loader, scheduler = prepare(accelerator, model, own, loader, scheduler)
        rates = train(accelerator, model, optimizer, loader, scheduler)
        assert rates == [SCHEDULE(t) for t in range(UPDATES)]
        if scheduler is not None:
            assert scheduler.scheduler.last_epoch == lengthened * UPDATES
        assert_trained(model, trained_without(0.7))
        assert same_on_all_ranks(own.grad_norm, *(param.detach() for param in model.parameters()))


@pytest.mark.parametrize(
    ("driver", "scheduler_steps"),
    [
        ("inside", "not at all"),
        ("nexus", "once for each process"),
        ("nexus", "once, since batches are split"),
    ],
)
def test_two_processes_train_as_one(worlds: Worlds, driver: str, scheduler_steps: str) -> None:
    worlds(2).run(two_processes, driver, scheduler_steps)


def overflow_on_one_of_two() -> None:
    with in_this_world():
        accelerator = accelerator_with_a_scaler()
        model = make_model(torch.float32)
        own, scheduler = make_optimizer(model, "nexus", lengthened=2, max_grad_norm=0.7)
        reference = Float64AdamW(list(model.parameters()), lr=SCHEDULE, weight_decay=DECAY, max_grad_norm=0.7)
        loader = make_loader(ROWS // 2, torch.float32, updates=10)
        model, optimizer, loader, scheduler = prepare(accelerator, model, own, loader, scheduler)
        for step, (x, y) in enumerate(loader):
            overflows = step in (2, 5)
            accelerator.backward(loss_of(model, x * 1e6 if overflows and dist.get_rank() == 1 else x, y))
            if not overflows:
                scale = accelerator.scaler.get_scale()
                reference.step([param.grad.double() / scale for param in model.parameters()])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            assert accelerator.optimizer_step_was_skipped == overflows
            assert scheduler.scheduler.last_epoch == 2 * reference.completed
        assert reference.completed == 8
        assert_same_run(own, reference)
        assert same_on_all_ranks(*snapshot(own))


def test_what_overflows_in_one_process_is_skipped_in_both(worlds: Worlds) -> None:
    worlds(2).run(overflow_on_one_of_two)


def fully_shard_by_hand(accelerator: Accelerator) -> None:
    """Accelerate shards on GPUs alone. What it sets there does its work on the CPU as well."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10, reshard_after_forward=True
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    assert accelerator.is_fsdp2


def parameters_swapped_for_shards(driver: str, scaled: bool) -> None:
    with in_this_world():
        accelerator = Accelerator(cpu=True)
        if scaled:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # in float64 a power of 2 is exact
        fully_shard_by_hand(accelerator)
        model = make_model(torch.float64)
        own, scheduler = make_optimizer(model, driver, lengthened=2, max_grad_norm=0.7)
        loader = make_loader(ROWS // 2, torch.float64)
        model, optimizer, loader, scheduler = prepare(accelerator, model, own, loader, scheduler)
        assert {type(param) for group in own.param_groups for param in group["params"]} == {DTensor}
        batches = list(loader)
        if scaled:  # as many overflows as updates, each followed by its batch once more
            overflow = [(x * (math.inf if dist.get_rank() == 1 else 1.0), y) for x, y in batches]
            batches = [each for pair in zip(overflow, batches, strict=True) for each in pair]
        rates, skipped = [], []
        for x, y in batches:
            accelerator.backward(loss_of(model, x, y))
            rate = float(own.param_groups[0]["lr"])
            optimizer.step()
            rates.append(rate if scheduler is not None else float(own.param_groups[0]["lr"]))
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
            skipped.append(accelerator.optimizer_step_was_skipped)
        assert skipped == ([True, False] * UPDATES if scaled else [False] * UPDATES)
        assert rates[scaled :: 1 + scaled] == [SCHEDULE(t) for t in range(UPDATES)]
        for param, expected in zip(model.parameters(), trained_without(0.7), strict=True):
            torch.testing.assert_close(whole(param).detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("driver", "scaled"), [("inside", False), ("nexus", True)])
def test_fsdp2_by_accelerate_trains_as_one_process(worlds: Worlds, driver: str, scaled: bool) -> None:
    worlds(2).run(parameters_swapped_for_shards, driver, scaled)


# The example.


def losses_in(printed: str) -> list[float]:
    steps, losses = zip(*re.findall(r"^step (\d+): loss (\d\.\d{4})$", printed, re.MULTILINE), strict=True)
    assert steps == ("50", "100", "150", "200", "250", "300")
    return [float(loss) for loss in losses]


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
    page = (ROOT / "docs" / "trainers" / "accelerate.md").read_text("utf-8")
    assert losses_in(page) == pytest.approx(found, rel=0.2)  # as tests/test_examples.py has it, of other machines
    assert EXAMPLE.read_text("utf-8").count("\n") < 50


def test_accelerate_launches_the_example_on_two_processes() -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(EXAMPLE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    # Gloo's threads of torch 2.13 sometimes abort a process that has done its work, also with torch's AdamW alone.
    assert run.returncode == 0 or "terminate called without an active exception" in run.stderr, run.stderr
    page = (ROOT / "docs" / "trainers" / "accelerate.md").read_text("utf-8")
    assert losses_in(run.stdout) == pytest.approx(losses_in(page), rel=0.2)
