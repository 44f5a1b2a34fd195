"""Captured training steps of models that are spread over processes: FSDP2 and tensor-parallel layers.

On the CPU, graphs are those of distributed_graphs.py; test_distributed_gpu.py runs the same in CUDA graphs over NCCL.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    OPTIONS,
    SCHEDULE,
    batch,
    lone_group,
    loss_of,
    make_fsdp,
    my_rows,
    same_on_all_ranks,
    whole,
)
from references import same_bits
from test_distributed_meshes import make_tensor_parallel
from torch import Tensor
from worlds import in_processes

from nexus.optim import FusedAdamW
from nexus.training import capture_train_step

STEPS, BAD = 14, 8


def graphs(device: str = "cpu") -> contextlib.AbstractContextManager[None]:
    """Lets steps be captured."""
    return importlib.import_module("distributed_graphs").graphs() if device == "cpu" else contextlib.nullcontext()


def train(backend: str, device: str, how: str, captures: bool) -> tuple[list[Tensor], int]:
    """All that a run ends with, and how many graphs it has made."""
    if how == "fsdp":
        model, dtype, rows = make_fsdp(device=device), torch.float32, my_rows
    else:
        model, dtype, rows = make_tensor_parallel(device), torch.float64, lambda tensor: tensor
    options = {**OPTIONS, "skip_nonfinite": True, "norm_group": lone_group()}
    optimizer = FusedAdamW(model.parameters(), backend=backend, **options)
    history = optimizer.history(capacity=STEPS)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    captured = capture_train_step(train_step, optimizer)
    losses = []
    for index in range(STEPS):
        x, y = map(rows, batch(index, dtype, device))
        if index == BAD and dist.get_rank() == dist.get_world_size() - 1:
            y = y * math.nan
        if index == 5:
            optimizer.param_groups[0]["weight_decay"] = 0.5
        # The first ones are not captured: what FSDP2 makes in its first step is then there, and freed.
        loss = (captured if captures and index > 2 else train_step)(x, y)
        losses.append(loss.nan_to_num(-1.0).clone())
    rates = history.read().lr[:, 0].tolist()
    assert rates == pytest.approx([SCHEDULE(t - (t > BAD)) for t in range(STEPS)], rel=1e-15)
    assert int(optimizer.skipped_steps) == 1
    found = [*model.parameters(), *(param.grad for param in model.parameters())]
    found += [optimizer.state[param][name] for param in model.parameters() for name in optimizer.state[param]]
    ends = [whole(tensor).detach().cpu().clone() for tensor in (*found, optimizer.grad_norm)]
    assert same_on_all_ranks(*ends)
    return [*(loss.cpu() for loss in losses), *ends], captured.graph_count


@pytest.mark.parametrize("how", ["fsdp", "tensor parallel"])
@in_processes(2, backend="cuda on cpu", device="cpu")
def test_a_captured_training_step_equals_the_plain_one(how: str, backend: str, device: str) -> None:
    expected, _ = train(backend, device, how, captures=False)
    with graphs(device):
        found, count = train(backend, device, how, captures=True)
    assert count == 1
    assert same_bits(found, expected)


def accumulated(captures: bool) -> list[Tensor]:
    """Gradients of three batches for each update, by two steps that share them."""
    model = make_fsdp()
    optimizer = FusedAdamW(model.parameters(), backend="cuda on cpu", **OPTIONS)

    def accumulate(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    def update(x: Tensor, y: Tensor) -> Tensor:
        loss = accumulate(x, y)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss

    steps = [capture_train_step(step, optimizer) if captures else step for step in (accumulate, update)]
    losses = [steps[index % 3 == 2](*map(my_rows, batch(index))).detach().clone() for index in range(13)]
    ends = (*model.parameters(), *(param.grad for param in model.parameters()), optimizer.grad_norm)
    return [*losses, *(whole(tensor).detach().clone() for tensor in ends)]


@in_processes(2)
def test_captured_steps_that_accumulate_share_their_gradients() -> None:
    expected = accumulated(captures=False)
    with graphs():
        assert same_bits(accumulated(captures=True), expected)


def move(param: Tensor) -> None:
    param._local_tensor = param._local_tensor.clone()


def leave_a_gradient(param: Tensor) -> None:
    param.grad = torch.zeros_like(param)


CHANGES: dict[Callable[[Tensor], None], str] = {
    move: "parameter 0 of group 0 is not where it was",
    leave_a_gradient: "parameter 0 of group 0 has a gradient before the step",
}


@pytest.mark.parametrize("change", CHANGES)
@in_processes(2)
def test_what_a_graph_cannot_see_of_a_part_is_an_error(change: Callable[[Tensor], None]) -> None:
    """The step adds to what FSDP2 finds as gradients, and then drops them."""
    model = make_fsdp()
    optimizer = FusedAdamW(model.parameters(), backend="cuda on cpu", **OPTIONS)

    def train_step(x: Tensor, y: Tensor) -> None:
        loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    with graphs():
        step = capture_train_step(train_step, optimizer)
        for index in range(4):
            step(*map(my_rows, batch(index)))
        change(model.first.weight)
        with pytest.raises(RuntimeError, match=CHANGES[change]):
            step(*map(my_rows, batch(4)))
