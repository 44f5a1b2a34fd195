"""The CUDA backend's launches: how many, where, in which order, under capture, and when one fails.

What the kernels compute, the other tests compare with the references, on the CPU under the name "cuda on cpu".
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CHUNK
from cuda_on_cpu import NAME, captured_step, runner_of, shim
from cuda_shim.controls import Shim
from references import (
    Float64AdamW,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    params_of,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from torch import Tensor

from nexus.backends.interface import DevicePlan, Plan, StepState
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.optim.storage import MODES
from nexus.schedules import WSD, Cosine

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAUNCH_FAILURE = 719
CLIPPED = {"max_grad_norm": 1.0, "skip_nonfinite": True}


@pytest.fixture
def gpu() -> Iterator[Shim]:
    """Steers the device that stands in."""
    shim().reset()
    yield shim()
    shim().reset()


def kernels(gpu: Shim) -> list[str]:
    return [launch.kernel for launch in gpu.launches()]


def completed(optimizer: FusedAdamW) -> int:
    (state,) = engine_of(optimizer).states.values()
    return int(state.completed)


def step(optimizer: FusedAdamW) -> None:
    """With new gradients, elsewhere."""
    params = params_of(optimizer)
    set_grads(params, make_grads(params))
    optimizer.step()


def mixed_params() -> list[Tensor]:
    return [param for dtype in DTYPES for param in make_params([(33,), (), (0,), (CHUNK + 5,)], dtype)]


# How many launches.


@pytest.mark.parametrize("count", [1, 3000])
def test_one_update_for_any_number_of_tensors(gpu: Shim, count: int) -> None:
    params = make_params([(1 + index % 7,) for index in range(count)])
    optimizer, reference = run_beside_torch(params, NAME)
    assert_same_run(optimizer, reference)
    grads = [param.grad for param in params]
    gpu.reset()
    for _ in range(2):
        optimizer.step()
    assert kernels(gpu) == ["prepare", "update_tensors"] * 2
    assert gpu.launches()[-1].grid == count
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))


def test_one_update_for_any_mixture_of_dtypes(gpu: Shim) -> None:
    params = mixed_params()
    optimizer, reference = FusedAdamW(params, backend=NAME, **CLIPPED), Float64AdamW(params, max_grad_norm=1.0)
    step_both(optimizer, reference, steps=5)
    assert_same_run(optimizer, reference)
    gpu.reset()
    optimizer.step()
    assert kernels(gpu) == ["sum_squares", "prepare", *["update_tensors"] * len(DTYPES)]


def test_one_update_for_each_way_of_storing(gpu: Shim) -> None:
    """Of each, and for what fills no whole turns, whose launch is the last and moves the counters."""
    modes = [options for _, dtype, options in MODES if options and dtype == torch.bfloat16]
    groups = [{"params": make_params([(5000,)] * 2, torch.bfloat16), **options} for options in modes]
    optimizer = FusedAdamW(groups, backend=NAME, **CLIPPED)
    step(optimizer)
    step(optimizer)
    gpu.reset()
    optimizer.step()
    assert kernels(gpu) == ["sum_squares", "prepare", *["update_encoded"] * (len(modes) + 1)]
    assert completed(optimizer) == 3


def test_pointers_travel_only_when_they_change(gpu: Shim) -> None:
    params = make_params([(5,)] * 600)
    optimizer = FusedAdamW(params, lr=Cosine(peak_lr=1.0, total_steps=10), backend=NAME)
    step(optimizer)
    gpu.reset()

    def uploads() -> int:
        optimizer.step()
        return kernels(gpu).count("store")

    assert [uploads() for _ in range(3)] == [0, 0, 0]
    params[300].grad = torch.ones(5)
    assert uploads() == 1
    params[0].grad = None
    assert uploads() == 2
    optimizer.param_groups[0]["weight_decay"] = 0.5
    assert uploads() == 3
    assert gpu.calls("allocate") == gpu.calls("free") == 0


def test_steps_wait_for_nothing(gpu: Shim) -> None:
    """The kernels' sources name no other function that waits: the shim has none."""
    optimizer = FusedAdamW(
        mixed_params(), lr=WSD(warmup_steps=2, stable_steps=2, decay_steps=2, peak_lr=0.1), backend=NAME, **CLIPPED
    )
    for _ in range(5):
        step(optimizer)
    assert (gpu.calls("cudaStreamSynchronize"), gpu.calls("allocate")) == (0, 1)


def test_launches_are_on_the_callers_stream(gpu: Shim) -> None:
    optimizer = FusedAdamW(make_params([(5,)]), backend=NAME, **CLIPPED)
    for stream in (gpu.stream(), 0, gpu.stream()):
        gpu.reset()
        runner_of(optimizer).stream = stream
        step(optimizer)
        assert {launch.stream for launch in gpu.launches()} == {stream}


# The same numbers, whatever the device.


@pytest.mark.parametrize("order", ["descending", "shuffled"])
@pytest.mark.parametrize(
    "options",
    [{}, {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}],
    ids=["float32 moments", "8-bit moments"],
)
def test_the_bits_do_not_depend_on_the_order(gpu: Shim, options: dict[str, Any], order: str) -> None:
    params, seed = mixed_params(), random.randrange(1000)
    if options:
        params = [param for param in params if param.dtype != torch.float64]
    rounds = [make_grads(params) for _ in range(3)]

    def run() -> list[Tensor]:
        optimizer = FusedAdamW(copies(params), backend=NAME, amsgrad=not options, **options, **CLIPPED)
        for grads in rounds:
            set_grads(params_of(optimizer), [grad.clone() for grad in grads])
            optimizer.step()
        return [*snapshot(optimizer), optimizer.grad_norm]

    ascending = run()
    gpu.set_order(blocks=order, threads=order, seed=seed)
    assert same_bits(ascending, run()), seed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_the_bits_do_not_depend_on_alignment(gpu: Shim, dtype: torch.dtype, offset: int) -> None:
    size = CHUNK + 77
    param, grad = make_params([(size,)], dtype)[0], torch.randn(size, dtype=dtype)

    def run(shift: int) -> list[Tensor]:
        def shifted(values: Tensor) -> Tensor:
            return torch.cat([torch.zeros(shift, dtype=dtype), values.detach()])[shift:]

        own = torch.nn.Parameter(shifted(param))
        own.grad = shifted(grad)
        optimizer = FusedAdamW([own], backend=NAME, **CLIPPED)
        for _ in range(3):
            optimizer.step()
        return [*snapshot(optimizer), optimizer.grad_norm]

    assert same_bits(run(0), run(offset))


# Failures.


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_launch_that_fails_changes_nothing(gpu: Shim, nth: int) -> None:
    params = mixed_params()
    optimizer, reference = FusedAdamW(params, backend=NAME, **CLIPPED), Float64AdamW(params, max_grad_norm=1.0)
    step_both(optimizer, reference, steps=2)
    before, version = snapshot(optimizer), params[0]._version
    grads = make_grads(params)
    set_grads(params, grads)  # elsewhere, so that there is an upload before the norm, the prologue and the update
    gpu.fail(LAUNCH_FAILURE, nth)
    with pytest.raises(RuntimeError, match=r"nexus: .* failed: cudaErrorLaunchFailure \(.+\)"):
        optimizer.step()
    assert same_bits(before, snapshot(optimizer))
    assert completed(optimizer) == 2
    assert int(optimizer.skipped_steps) == 0
    assert params[0]._version == version
    optimizer.step()
    reference.step(grads)
    assert_same_run(optimizer, reference)


def test_where_a_later_launch_of_a_mixed_update_fails_no_counter_moves(gpu: Shim) -> None:
    optimizer = FusedAdamW(mixed_params(), backend=NAME)
    step(optimizer)
    gpu.fail(LAUNCH_FAILURE, 3)  # the prologue, then an update for each dtype
    with pytest.raises(RuntimeError, match="nexus: the update failed"):
        optimizer.step()
    assert (completed(optimizer), int(optimizer.skipped_steps)) == (1, 0)


# Capture.


def test_a_captured_step_is_replayed_with_rates_that_move(gpu: Shim) -> None:
    params, schedule = (
        make_params([(5,), (CHUNK + 1,)]),
        WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-2),
    )
    optimizer, reference = run_beside_torch(params, NAME, steps=1, lr=schedule, max_grad_norm=1.0)
    before = snapshot(optimizer)
    buffers = [param.grad for param in params]
    gpu.reset()
    graph = captured_step(optimizer)
    assert same_bits(before, snapshot(optimizer))
    captured = [launch.kernel for launch in gpu.launches() if launch.captured]
    assert captured == ["sum_squares", "prepare", "update_tensors"]
    assert gpu.capture_mode_is_global()
    for t in range(1, 12):
        grads = make_grads(params)
        for buffer, grad in zip(buffers, grads, strict=True):
            buffer.copy_(grad)
        graph.replay()
        reference.step(grads)
        assert float(optimizer.param_groups[0]["lr"]) == schedule(t)
    assert_same_run(optimizer, reference)
    assert completed(optimizer) == 12


def test_steps_between_replays_do_not_disturb_them(gpu: Shim) -> None:
    params = make_params([(5,), (7,)])
    optimizer, reference = run_beside_torch(params, NAME, steps=1)
    rounds = [[param.grad for param in params], make_grads(params)]
    graphs = []
    for grads in rounds:
        set_grads(params, grads)
        graphs.append(captured_step(optimizer))
    for _ in range(3):
        for graph, grads in zip(graphs, rounds, strict=True):
            graph.replay()
            reference.step(grads)
            step_both(optimizer, reference, steps=1)  # eagerly, with gradients elsewhere
    added = make_params([(70_000,)])
    optimizer.add_param_group({"params": added})  # which moves the table of the eager steps
    set_grads([*params, *added], [None, None, *make_grads(added)])
    optimizer.step()
    reference.step([None, None])
    for graph, grads in zip(graphs, rounds, strict=True):
        graph.replay()
        reference.step(grads)
    optimizer.param_groups.pop()
    assert_same_run(optimizer, reference)


def test_hyperparameters_reach_captured_steps(gpu: Shim) -> None:
    params = make_params([(5,), (7,)])
    groups = [
        {"params": params[:1], "lr": 1e-2},
        {"params": params[1:], "weight_decay": Cosine(peak_lr=0.1, total_steps=50)},
    ]
    optimizer, reference = run_beside_torch(groups, NAME, steps=1, max_grad_norm=10.0)
    grads = [param.grad for param in params]
    graph = captured_step(optimizer)
    changes: list[tuple[float | None, dict[str, Any]]] = [
        (10.0, {}),
        (0.1, {"lr": 3e-3}),
        (0.1, {"weight_decay": 0.5}),
        (None, {"betas": (0.5, 0.6)}),
        (3.0, {"lr": 0.5, "eps": 1e-2, "maximize": True}),
    ]
    for limit, change in changes:
        optimizer.param_groups[0].update(change)
        for group in optimizer.param_groups:
            group["max_grad_norm"] = limit
        optimizer.sync_hyperparameters()
        graph.replay()
        reference.optimizer.param_groups[0].update(change)
        reference.max_grad_norm = limit
        reference.step(grads)
    assert_same_run(optimizer, reference)
    step_both(optimizer, reference, steps=1)  # eagerly
    assert_same_run(optimizer, reference)


def test_clipping_cannot_be_switched_on_in_a_graph_without_a_norm(gpu: Shim) -> None:
    optimizer = FusedAdamW(make_params([(5,)]), backend=NAME)
    optimizer.sync_hyperparameters()  # before any step: nothing to do
    step(optimizer)
    graph = captured_step(optimizer)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(RuntimeError, match="clipping cannot be switched on in it"):
        optimizer.sync_hyperparameters()
    del graph
    optimizer.sync_hyperparameters()


# Several devices, of which the second is of the shim's making: its tensors are the CPU's too.


def test_several_devices_share_one_norm(gpu: Shim) -> None:
    gpu.set_devices(count=2)
    params = make_params([(5,), (CHUNK + 3,), (9,)])
    optimizer, reference = run_beside_torch(params, NAME, steps=0, max_grad_norm=0.5)
    grads = make_grads(params)
    set_grads(params, grads)
    runner = runner_of(optimizer)
    plan = engine_of(optimizer).make_plan(vars(optimizer))
    (whole,) = plan.devices.values()
    split = {}
    for index, entries in enumerate((whole.entries[:2], whole.entries[2:])):
        state = StepState(torch.device("cpu"), False, 0)
        state.device = torch.device("cpu", index)
        split[state.device] = DevicePlan(state, whole.groups, entries, True)
    runner.bind(Plan(plan.parameters, split), vars(optimizer))
    gpu.reset()
    gpu.set_devices(count=2)
    for _ in range(3):
        runner.step(None, None)
        reference.step(grads)
    assert_same_run(optimizer, reference)
    assert {launch.device for launch in gpu.launches()} == {0, 1}
    for device_plan in split.values():
        assert int(device_plan.state.completed) == 3
        torch.testing.assert_close(device_plan.state.grad_norm, reference.grad_norm, rtol=1e-12, atol=0.0)
