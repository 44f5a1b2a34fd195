"""On GPUs, one process for each, over NCCL: what other files show on the CPU over gloo. One GPU is enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_distributed_capture as capture
import test_distributed_data_parallel as data_parallel
import test_distributed_fsdp as fsdp
import test_distributed_meshes as meshes
import torch
from distributed_cases import OPTIONS, SCHEDULE, batch, lone_group, loss_of, make_fsdp, my_rows
from test_distributed_checkpoint import END, STOP, assert_same, go_on, uninterrupted
from worlds import World, Worlds

from nexus.optim import FusedAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.xdist_group("distributed"),
]


@pytest.fixture
def world(worlds: Worlds) -> World:
    return worlds(min(torch.cuda.device_count(), 4), "cuda")


ON_BACKENDS: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (fsdp.test_fsdp_follows_float64_torch_on_the_same_gradients, {"steps": 30, "how": "plain"}),
    (fsdp.test_all_skip_what_one_process_cannot_use, {"placed": "all sharded", "sees": "a nan", "clips": True}),
    (meshes.test_tensor_parallel_layers_train_as_one_process, {}),
    (data_parallel.test_ddp_trains_as_one_process, {"bucket_view": True}),
    (capture.test_a_captured_training_step_equals_the_plain_one, {"how": "fsdp"}),
    (capture.test_a_captured_training_step_equals_the_plain_one, {"how": "tensor parallel"}),
]
each_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


@each_backend
@pytest.mark.parametrize(("test", "given"), ON_BACKENDS)
def test_what_passes_on_the_cpu(world: World, backend: str, test: Callable[..., None], given: dict[str, Any]) -> None:
    world.run(test, backend=backend, device="cuda", **given)


@pytest.mark.parametrize("how", ["bfloat16", "offloaded"])
def test_fsdp_with_a_policy_follows_float64_torch(world: World, how: str) -> None:
    world.run(fsdp.test_fsdp_follows_float64_torch_on_the_same_gradients, "auto", 30, how, "cuda")


def goes_on_as_if_uninterrupted(folder: Path) -> None:
    go_on(None, folder, 0, STOP, device="cuda")
    assert_same(go_on(folder, None, STOP, END, device="cuda"), uninterrupted(device="cuda"))


def test_a_checkpoint_goes_on(world: World, tmp_path: Path) -> None:
    world.run(goes_on_as_if_uninterrupted, tmp_path)


def steps_while_waiting_is_an_error(backend: str) -> None:
    model = make_fsdp(device="cuda")
    optimizer = FusedAdamW(
        model.parameters(), backend=backend, skip_nonfinite=True, norm_group=lone_group(), **OPTIONS
    )
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, *map(my_rows, batch(step, device="cuda"))).backward()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(SCHEDULE(4), rel=1e-15)


@each_backend
def test_no_step_waits_for_the_device(world: World, backend: str) -> None:
    world.run(steps_while_waiting_is_an_error, backend)
