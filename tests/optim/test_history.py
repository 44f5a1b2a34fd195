"""The history: what each step leaves on the device, beside the oracle and torch's clipping."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from cuda_on_cpu import NAME, Runner, shim
from cuda_shim.controls import Shim
from references import (
    EVERY_BACKEND,
    copies,
    make_grads,
    make_params,
    same_bits,
    set_grads,
    snapshot,
    tensors_where_it_runs,
)
from torch import Tensor

from nexus.backends import triton
from nexus.backends.interface import DevicePlan, Plan, StepState
from nexus.optim import FusedAdamW, HistoryRows
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Cosine, CosineRestarts, Schedule

if triton.INTERPRETS and triton.unavailable() is None:
    import triton_interpreter  # noqa: F401  # mends it

INTERPRETED = pytest.param(
    "triton",
    id="triton on cpu",
    marks=pytest.mark.skipif(
        not triton.INTERPRETS or triton.unavailable() is not None, reason="Triton is not here, or runs on the GPU"
    ),
)
LAUNCH_FAILURE = 719


@pytest.fixture(params=[*EVERY_BACKEND, INTERPRETED])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with tensors_where_it_runs("cpu" if triton.INTERPRETS else request.param):
        yield request.param


@pytest.fixture
def gpu() -> Iterator[Shim]:
    shim().reset()
    yield shim()
    shim().reset()


def own_params(optimizer: FusedAdamW) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def step(optimizer: FusedAdamW, spoil: float | None = None) -> Tensor:
    """One step; returns the norm of its gradients in float64."""
    params = own_params(optimizer)
    grads = make_grads(params)
    if spoil is not None:
        grads[0].view(-1)[-1] = spoil
    set_grads(params, grads)
    optimizer.step()
    return torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().cpu()


def torch_clip(max_norm: float, norm: Tensor) -> float:
    """What torch multiplies a gradient by."""
    probe = torch.nn.Parameter(torch.ones((), dtype=torch.float64, device="cpu"))
    probe.grad = torch.ones_like(probe)
    torch.nn.utils.clip_grads_with_norm_([probe], max_norm, norm, foreach=False)
    return float(probe.grad)


def assert_rates(actual: Tensor, expected: list[Any], optimizer: FusedAdamW) -> None:
    """Bit for bit, but for the reference backend and on a GPU, where the last bit of a cosine may be another."""
    exact = optimizer.backend in ("native", NAME)
    expected = torch.tensor(expected, dtype=torch.float64, device="cpu")
    torch.testing.assert_close(actual, expected, rtol=0.0 if exact else 1e-15, atol=0.0, equal_nan=True)


def assert_rows(rows: HistoryRows, steps: list[int], overwritten: int = 0) -> None:
    assert rows.step.tolist() == steps
    assert rows.step.dtype == torch.int64
    assert rows.overwritten == overwritten
    assert rows.skipped.tolist() == [False] * len(steps)


# What is in a row.


def test_rows_equal_the_oracle_and_torchs_clipping(backend: str) -> None:
    schedules = [
        WSD(4, 5, 6, 0.1, 0.01, "sqrt"),
        Cosine(0.2, 13, warmup_steps=3),
        CosineRestarts(0.3, cycle_length=4),
    ]
    narrow, wide = torch.tensor(0.5, dtype=torch.float32), torch.tensor([0.25], dtype=torch.float64)
    rates = [*schedules, narrow, wide, 1e-3, schedules[0]]
    limits = [0.5, 1e9, None, 3.0, float("inf"), 1.5, 0.5]
    groups: list[dict[str, Any]] = [
        {
            "params": make_params([(3,), (40 + index,)]),
            "lr": lr,
            "max_grad_norm": limit,
            "lr_scale": 0.5**index if isinstance(lr, Schedule) else 1.0,
        }
        for index, (lr, limit) in enumerate(zip(rates, limits, strict=True))
    ]
    groups[6]["params"] = []  # has nothing to update, and has rates all the same
    optimizer = FusedAdamW(groups, backend=backend)
    history = optimizer.history(capacity=50)
    expected_lr, expected_clip, norms = [], [], []
    for t in range(20):
        if t % 6 == 5:
            narrow.mul_(0.3)
            wide.add_(0.1)
            optimizer.param_groups[5]["lr"] *= 0.9  # as a scheduler of torch does
            optimizer.param_groups[0]["max_grad_norm"] = limits[0] = 0.1 * t
        norms.append(step(optimizer))
        shown = [float(group["lr"]) for group in optimizer.param_groups]
        expected_lr.append(shown)
        oracle = [0.5**i * schedules[i % 6](t) for i in (0, 1, 2, 6)]
        assert_rates(
            torch.tensor([shown[i] for i in (0, 1, 2, 6)], dtype=torch.float64, device="cpu"), oracle, optimizer
        )
        expected_clip.append([1.0 if limit is None else torch_clip(limit, norms[-1]) for limit in limits])
    rows = history.read()
    assert_rows(rows, list(range(20)))
    assert rows.lr.shape == rows.clip.shape == (20, 7)
    assert torch.equal(rows.lr, torch.tensor(expected_lr, dtype=torch.float64, device="cpu"))
    torch.testing.assert_close(rows.grad_norm, torch.stack(norms), rtol=1e-12, atol=0.0)
    clip = torch.tensor(expected_clip, dtype=torch.float64, device="cpu")
    torch.testing.assert_close(rows.clip, clip, rtol=1e-12, atol=0.0)
    assert (rows.clip[:, 0] < 1.0).any()
    assert (rows.clip[:, [1, 2, 4]] == 1.0).all()
    assert len(rows.clip[:, 0].unique()) == 20
    assert all(tensor.device.type == "cpu" for tensor in rows[:5])


def test_a_norm_that_is_not_measured_is_nan(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(5,)]), backend=backend)
    history = optimizer.history()
    assert history.capacity == 10_000
    step(optimizer)
    optimizer.param_groups[0]["max_grad_norm"] = 0.5
    norm = step(optimizer)
    optimizer.param_groups[0]["max_grad_norm"] = None
    step(optimizer)
    rows = history.read()
    assert rows.grad_norm.isnan().tolist() == [True, False, True]
    torch.testing.assert_close(rows.grad_norm[1], norm, rtol=1e-12, atol=0.0)
    assert rows.clip[:, 0].tolist() == [1.0, pytest.approx(torch_clip(0.5, norm), rel=1e-12), 1.0]
    assert rows.lr.flatten().tolist() == [1e-3] * 3


def test_steps_without_a_gradient_leave_rows(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(5,)]), lr=Cosine(0.1, 9), max_grad_norm=1.0, backend=backend)
    history = optimizer.history()
    for t in range(4):
        own_params(optimizer)[0].grad = torch.ones(5) if t % 2 else None
        optimizer.step()
    rows = history.read()
    assert_rows(rows, [0, 1, 2, 3])
    assert_rates(rows.lr[:, 0], [Cosine(0.1, 9)(t) for t in range(4)], optimizer)
    torch.testing.assert_close(rows.grad_norm, torch.tensor([0.0, 5.0, 0.0, 5.0], dtype=torch.float64).sqrt().cpu())


@pytest.mark.parametrize("start", [2**24 + 1, 2**53 - 8])
def test_steps_are_exact(backend: str, start: int) -> None:
    optimizer = FusedAdamW(make_params([(5,)]), lr=WSD(2**52, 2**52, 2**50, 1.0), backend=backend)
    history = optimizer.history(capacity=4)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr_schedule"]["step"] = start
    optimizer.load_state_dict(saved)
    for _ in range(6):
        step(optimizer)
    assert_rows(history.read(), list(range(start + 2, start + 6)), overwritten=2)


def test_it_changes_no_bit_of_the_run(backend: str) -> None:
    params = make_params([(33,), (4, 5)])
    options: dict[str, Any] = {"lr": Cosine(0.1, 9), "max_grad_norm": 1.0, "skip_nonfinite": True, "backend": backend}
    plain, recorded = FusedAdamW(copies(params), **options), FusedAdamW(copies(params), **options)
    recorded.history(capacity=2)
    for t in range(6):
        grads = make_grads(params)
        if t == 3:
            grads[0][0] = torch.inf
        for optimizer in (plain, recorded):
            set_grads(own_params(optimizer), [grad.clone() for grad in grads])
            optimizer.step()
    assert same_bits(snapshot(plain), snapshot(recorded))
    assert torch.equal(plain.grad_norm, recorded.grad_norm)
    assert torch.equal(plain.param_groups[0]["lr"], recorded.param_groups[0]["lr"])


# Skipped steps.


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_skipped_step_leaves_the_rates_it_would_have_used(backend: str, value: float) -> None:
    schedules = [WSD(3, 4, 5, 0.1), Cosine(0.2, 9)]
    params = make_params([(5,), (6,)])
    groups = [{"params": [param], "lr": lr} for param, lr in zip(params, schedules, strict=True)]
    groups[1]["max_grad_norm"] = None
    optimizer = FusedAdamW(groups, max_grad_norm=1.0, skip_nonfinite=True, backend=backend)
    history = optimizer.history()
    expected, completed = [], 0
    for index in range(14):
        skip = index % 4 == 0 or index == 5
        before = [float(group["lr"]) for group in optimizer.param_groups]
        step(optimizer, spoil=value if skip else None)
        if skip:
            assert [float(group["lr"]) for group in optimizer.param_groups] == before
        expected.append((completed, skip))
        completed += not skip
    rows = history.read()
    assert list(zip(rows.step.tolist(), rows.skipped.tolist(), strict=True)) == expected
    assert_rates(rows.lr, [[schedule(t) for schedule in schedules] for t, _ in expected], optimizer)
    assert torch.equal(rows.grad_norm.isfinite(), ~rows.skipped)
    assert (rows.clip[:, 1] == 1.0).all()
    clip = torch.tensor([torch_clip(1.0, norm) for norm in rows.grad_norm], dtype=torch.float64, device="cpu")
    torch.testing.assert_close(rows.clip[:, 0], clip, rtol=1e-12, atol=0.0, equal_nan=True)


def test_gradients_of_a_scaler(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(5,)]), lr=Cosine(0.1, 9), max_grad_norm=0.5, backend=backend)
    history = optimizer.history()
    optimizer.grad_scale = torch.tensor(8.0)
    norms = []
    for found in (0.0, 1.0, 1.0, 0.0):
        optimizer.found_inf = torch.tensor(found)
        norms.append(step(optimizer) / 8.0)
    rows = history.read()
    assert rows.step.tolist() == [0, 1, 1, 1]
    assert rows.skipped.tolist() == [False, True, True, False]
    torch.testing.assert_close(rows.grad_norm, torch.stack(norms), rtol=1e-12, atol=0.0)
    clip = [torch_clip(0.5, norm) for norm in norms]
    assert rows.clip[:, 0].tolist() == pytest.approx(clip, rel=1e-12)
    assert_rates(rows.lr[:, 0], [Cosine(0.1, 9)(t) for t in (0, 1, 1, 1)], optimizer)


# The ring.


@pytest.mark.parametrize("capacity", [1, 2, 5, 7])
def test_the_newest_rows_are_kept_and_the_others_counted(backend: str, capacity: int) -> None:
    schedule = Cosine(0.1, 100)
    optimizer = FusedAdamW(make_params([(3,)]), lr=schedule, backend=backend)
    history = optimizer.history(capacity=capacity)
    t = 0
    for count in (0, 1, capacity - 1, capacity, capacity + 1, 0, 3 * capacity + 2, 1):
        for _ in range(count):
            step(optimizer)
        kept = min(count, capacity)
        t += count
        rows = history.read()
        assert_rows(rows, list(range(t - kept, t)), overwritten=count - kept)
        assert rows.lr.shape == rows.clip.shape == (kept, 1)
        if kept:
            assert_rates(rows.lr[:, 0], [schedule(s) for s in range(t - kept, t)], optimizer)


def test_what_was_read_does_not_change(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(3,)]), lr=Cosine(0.1, 9), backend=backend)
    history = optimizer.history(capacity=2)
    step(optimizer)
    first = history.read()
    before = copy.deepcopy(first)
    for _ in range(4):
        step(optimizer)
    again = history.read()
    for old, new in zip(before[:5], first[:5], strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())
    assert_rows(again, [3, 4], overwritten=2)
    assert_rows(history.read(), [])


def test_it_may_begin_in_mid_run(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(3,)]), lr=Cosine(0.1, 9), backend=backend)
    for _ in range(3):
        step(optimizer)
    history = optimizer.history(capacity=4)
    assert_rows(history.read(), [])
    for _ in range(2):
        step(optimizer)
    assert optimizer.history(capacity=4) is history
    assert_rows(history.read(), [3, 4])


@pytest.mark.parametrize("before", [2, 4, 6])
def test_a_group_added_in_mid_run(backend: str, before: int) -> None:
    schedule = Cosine(0.1, 100)
    optimizer = FusedAdamW(make_params([(3,)]), lr=schedule, max_grad_norm=2.0, backend=backend)
    history = optimizer.history(capacity=4)
    norms = [step(optimizer) for _ in range(before)]
    optimizer.add_param_group({"params": make_params([(4,)]), "lr": 0.25, "max_grad_norm": None})
    assert optimizer.history(4) is history
    norms += [step(optimizer) for _ in range(2)]
    rows = history.read()
    kept = list(range(before + 2))[-4:]
    assert_rows(rows, kept, overwritten=before - 2)
    assert rows.lr.shape == rows.clip.shape == (4, 2)
    assert_rates(rows.lr[:, 0], [schedule(t) for t in kept], optimizer)
    assert rows.lr[:, 1].nan_to_num(-1.0).tolist() == [-1.0, -1.0, 0.25, 0.25]
    assert rows.clip[:, 1].nan_to_num(-1.0).tolist() == [-1.0, -1.0, 1.0, 1.0]
    torch.testing.assert_close(rows.grad_norm, torch.stack(norms[-4:]), rtol=1e-12, atol=0.0)
    for _ in range(9):
        step(optimizer)
    rows = history.read()
    assert_rows(rows, list(range(before + 7, before + 11)), overwritten=5)
    assert rows.lr[:, 1].tolist() == [0.25] * 4


# Beside the optimizer's other doings.


def test_copies_and_checkpoints_have_none(backend: str) -> None:
    params = make_params([(3,)])
    optimizer = FusedAdamW(copies(params), lr=Cosine(0.1, 9), backend=backend)
    bare = FusedAdamW(copies(params), lr=Cosine(0.1, 9), backend=backend)
    history = optimizer.history(capacity=4)
    step(optimizer)
    step(bare)
    assert optimizer.state_dict().keys() == bare.state_dict().keys()
    saved, expected = io.BytesIO(), io.BytesIO()
    for found, out in ((optimizer, saved), (bare, expected)):
        torch.save(found.state_dict()["param_groups"], out)
    assert saved.tell() == expected.tell()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        step(other)
        theirs = other.history(capacity=7)
        assert theirs is not history
        step(other)
        assert_rows(theirs.read(), [2])
    assert_rows(history.read(), [0])
    step(optimizer)
    assert_rows(history.read(), [1])


def test_it_goes_on_after_a_checkpoint_is_loaded(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(3,)]), lr=Cosine(0.1, 9), backend=backend)
    history = optimizer.history(capacity=9)
    step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    block = history.block
    for _ in range(2):
        step(optimizer)
    optimizer.load_state_dict(saved)
    step(optimizer)
    assert_rows(history.read(), [0, 1, 2, 1])
    assert history.block is block


@pytest.mark.parametrize("capacity", [0, -1, 2**31 + 1])
def test_a_capacity_out_of_range_is_refused(capacity: int) -> None:
    optimizer = FusedAdamW(make_params([(3,)]))
    with pytest.raises(ValueError, match=f"capacity must be an int from 1 to 2147483648, got {capacity}"):
        optimizer.history(capacity=capacity)
    assert optimizer.history(capacity=3).capacity == 3


@pytest.mark.parametrize("capacity", [2.0, True, "3", None])
def test_a_capacity_that_is_no_count_is_refused(capacity: Any) -> None:
    with pytest.raises(TypeError, match="capacity must be an int from 1"):
        FusedAdamW(make_params([(3,)])).history(capacity=capacity)


def test_another_capacity_is_refused() -> None:
    optimizer = FusedAdamW(make_params([(3,)]))
    history = optimizer.history(capacity=numpy.int64(3))
    with pytest.raises(ValueError, match=r"has a history of capacity=3, got 10000 \(int\)"):
        optimizer.history()
    assert optimizer.history(3) is history


# The launches of the CUDA backend.


def test_it_takes_no_launch_and_no_memory_of_its_own(gpu: Shim) -> None:
    optimizer = FusedAdamW(make_params([(5,)]), lr=Cosine(0.1, 9), max_grad_norm=1.0, backend=NAME)
    step(optimizer)
    history = optimizer.history(capacity=3)
    optimizer.step()
    gpu.reset()
    for _ in range(4):
        optimizer.step()
    assert [launch.kernel for launch in gpu.launches()] == ["sum_squares", "prepare", "adamw_uniform"] * 4
    for call in ("cudaMalloc", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaMemcpyAsync"):
        assert not gpu.calls(call)
    assert_rows(history.read(), [3, 4, 5], overwritten=2)


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [2, 3, 4])
def test_a_launch_that_fails_leaves_no_row(gpu: Shim, nth: int, before: int) -> None:
    optimizer = FusedAdamW(make_params([(5,)]), lr=Cosine(0.1, 9), max_grad_norm=1.0, backend=NAME)
    history = optimizer.history(capacity=3)
    norms = [step(optimizer) for _ in range(before)]
    gpu.fail(LAUNCH_FAILURE, nth)
    with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
        step(optimizer)
    rows = history.read()
    kept = list(range(before))[-3:]
    assert_rows(rows, kept, overwritten=before - len(kept))  # also the oldest is whole
    assert_rates(rows.lr[:, 0], [Cosine(0.1, 9)(t) for t in kept], optimizer)
    torch.testing.assert_close(rows.grad_norm, torch.stack(norms[-3:]), rtol=1e-12, atol=0.0)
    step(optimizer)
    assert_rows(history.read(), [before])


def test_replays_of_a_captured_step_leave_rows(gpu: Shim) -> None:
    params, schedule = make_params([(5,)]), WSD(3, 4, 5, 1e-2)
    optimizer = FusedAdamW(params, lr=schedule, max_grad_norm=1.0, skip_nonfinite=True, backend=NAME)
    step(optimizer)
    history = optimizer.history(capacity=8)
    runner = engine_of(optimizer).prepare(vars(optimizer))
    assert isinstance(runner, Runner)
    runner.stream = gpu.stream()
    with gpu.capture(runner.stream) as graph:
        optimizer.step()
    runner.stream = 0
    assert_rows(history.read(), [])
    grad, norms = params[0].grad, []
    assert grad is not None
    for index in range(12):
        grad.copy_(make_grads(params)[0])
        if index == 5:
            grad[0] = torch.inf
        norms.append(grad.double().norm())
        graph.replay()
    rows = history.read()
    assert rows.step.tolist() == [5, 6, 6, 7, 8, 9, 10, 11]
    assert rows.overwritten == 4
    assert rows.skipped.tolist() == [False, True, *[False] * 6]
    assert rows.lr[:, 0].tolist() == [schedule(t) for t in rows.step.tolist()]
    torch.testing.assert_close(rows.grad_norm, torch.stack(norms[-8:]), rtol=1e-12, atol=0.0)
    # Beside a group that is added, the graph writes what nobody reads, where nothing else is.
    optimizer.add_param_group({"params": make_params([(7,)])})
    step(optimizer)
    graph.replay()
    assert_rows(history.read(), [12])


def test_of_several_devices_the_first_records(gpu: Shim) -> None:
    params = make_params([(5,), (7,)])
    optimizer = FusedAdamW(params, lr=1e-2, max_grad_norm=0.5, backend=NAME)
    history = optimizer.history()
    set_grads(params, make_grads(params))
    runner = engine_of(optimizer).prepare(vars(optimizer))
    plan = engine_of(optimizer).make_plan(vars(optimizer))
    (whole,) = plan.devices.values()
    split = {}
    for index, entry in enumerate(whole.entries):
        state = StepState(torch.device("cpu"), False)
        state.device = torch.device("cpu", index)
        split[state.device] = DevicePlan(state, whole.groups, [entry], True)
    history.attach(next(iter(split.values())))
    gpu.set_devices(count=2)
    runner.bind(Plan(plan.parameters, split), vars(optimizer))
    for _ in range(3):
        runner.step(None, None)
    rows = history.read()
    assert_rows(rows, [0, 1, 2])
    norm = torch.cat([param.grad.double() for param in params]).norm()  # over both
    torch.testing.assert_close(rows.grad_norm, norm.expand(3), rtol=1e-12, atol=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_replays_on_a_gpu_leave_rows(name: str) -> None:
    with tensors_where_it_runs(name):
        params, schedule = make_params([(5,), (70_000,)]), Cosine(0.1, 60, warmup_steps=7)
        optimizer = FusedAdamW(params, lr=schedule, max_grad_norm=1.0, backend=name)
        history = optimizer.history(capacity=40)
        step(optimizer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        norms = [optimizer.grad_norm.clone()]
        for _ in range(50):
            for param in params:
                param.grad.copy_(make_grads([param])[0])
            graph.replay()
            norms.append(optimizer.grad_norm.clone())
        rows = history.read()
        assert_rows(rows, list(range(11, 51)), overwritten=11)
        assert_rates(rows.lr[:, 0], [schedule(t) for t in range(11, 51)], optimizer)
        assert torch.equal(rows.grad_norm, torch.stack(norms[-40:]).cpu())
