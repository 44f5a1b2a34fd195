"""The history: what each step leaves on the device, beside the oracle and torch's clipping."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from cuda_on_cpu import NAME, captured_step
from cuda_shim.controls import Shim
from references import (
    EVERY_BACKEND,
    copies,
    make_grads,
    make_params,
    norm_rtol,
    same_bits,
    set_grads,
    snapshot,
    tensors_where_it_runs,
)
from side_by_side import params_of
from torch import Tensor

from nexus.backends import triton
from nexus.backends.interface import DevicePlan, Plan, StepState
from nexus.optim import FusedAdamW, HistoryRows
from nexus.optim.engine import engine_of
from nexus.optim.history import History
from nexus.schedules import WSD, Cosine, CosineRestarts

RUNS_INTERPRETED = triton.INTERPRETS and triton.unavailable() is None
if RUNS_INTERPRETED:
    import triton_interpreter  # noqa: F401  # mends it

INTERPRETED = pytest.param(
    "triton",
    id="triton on cpu",
    marks=pytest.mark.skipif(not RUNS_INTERPRETED, reason="Triton is not here, or runs on the GPU"),
)
LAUNCH_FAILURE = 719
SCHEDULE = Cosine(peak_lr=0.1, total_steps=60, warmup_steps=3)


@pytest.fixture(params=[*EVERY_BACKEND, INTERPRETED])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with tensors_where_it_runs("cpu" if triton.INTERPRETS else request.param):
        yield request.param


def recorded(backend: str, capacity: int = 50, **options: Any) -> tuple[FusedAdamW, History]:
    """An optimizer of one small parameter, and its history."""
    optimizer = FusedAdamW(make_params([(5,)]), backend=backend, **{"lr": SCHEDULE, **options})
    return optimizer, optimizer.history(capacity)


def step(optimizer: FusedAdamW, spoil: float | None = None) -> Tensor:
    """One step; returns the norm of its gradients in float64."""
    params = params_of(optimizer)
    grads = make_grads(params)
    if spoil is not None:
        grads[0].view(-1)[-1] = spoil
    set_grads(params, grads)
    optimizer.step()
    return torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().cpu()


def steps(optimizer: FusedAdamW, count: int) -> list[Tensor]:
    return [step(optimizer) for _ in range(count)]


def shown(optimizer: FusedAdamW) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def torch_clip(max_norm: float | None, norm: Tensor) -> float:
    """What torch multiplies a gradient by."""
    if max_norm is None:
        return 1.0
    probe = torch.nn.Parameter(torch.ones((), dtype=torch.float64, device="cpu"))
    probe.grad = torch.ones_like(probe)
    torch.nn.utils.clip_grads_with_norm_([probe], max_norm, norm, foreach=False)
    return float(probe.grad)


def host(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def assert_rates(actual: Tensor, expected: list[Any], optimizer: FusedAdamW) -> None:
    """Bit for bit, but for the reference backend and on a GPU, where the last bit of a cosine may be another."""
    exact = optimizer.backend in ("native", NAME)
    torch.testing.assert_close(actual, host(expected), rtol=0.0 if exact else 1e-15, atol=0.0, equal_nan=True)


def assert_rows(
    rows: HistoryRows,
    steps: list[int],
    overwritten: int = 0,
    norms: list[Tensor] | None = None,
    skipped: list[bool] | None = None,
    backend: str = "",
) -> None:
    assert rows.step.tolist() == steps
    assert rows.step.dtype == torch.int64
    assert rows.overwritten == overwritten
    assert rows.skipped.tolist() == (skipped or [False] * len(steps))
    if norms is not None:
        torch.testing.assert_close(
            rows.grad_norm, torch.stack(norms), rtol=norm_rtol(backend), atol=0.0, equal_nan=True
        )


def test_rows_are_the_rates_of_the_groups_and_torchs_clipping(backend: str) -> None:
    narrow, wide = torch.tensor(0.5, dtype=torch.float32), torch.tensor([0.25], dtype=torch.float64)
    options: list[dict[str, Any]] = [
        {
            "lr": WSD(warmup_steps=4, stable_steps=5, decay_steps=6, peak_lr=0.1, min_lr=0.01, decay_type="sqrt"),
            "max_grad_norm": 0.5,
        },
        {"lr": Cosine(peak_lr=0.2, total_steps=13, warmup_steps=3), "max_grad_norm": 1e9, "lr_scale": 0.5},
        {"lr": CosineRestarts(peak_lr=0.3, cycle_length=4), "max_grad_norm": None, "lr_scale": 0.25},
        {"lr": narrow, "max_grad_norm": 3.0},
        {"lr": wide, "max_grad_norm": float("inf")},
        {"lr": 1e-3, "max_grad_norm": 1.5},
        {
            "lr": WSD(warmup_steps=4, stable_steps=5, decay_steps=6, peak_lr=0.1, min_lr=0.01, decay_type="sqrt"),
            "max_grad_norm": 0.5,
            "lr_scale": 0.125,
            "params": [],
        },
    ]
    groups = [{"params": make_params([(3,), (40 + index,)]), **each} for index, each in enumerate(options)]
    optimizer = FusedAdamW(groups, backend=backend)
    history = optimizer.history(capacity=50)
    expected_lr, expected_clip, norms = [], [], []
    for t in range(20):
        if t % 6 == 5:
            narrow.mul_(0.3)
            wide.add_(0.1)
            optimizer.param_groups[5]["lr"] *= 0.9  # as a scheduler of torch does
            optimizer.param_groups[0]["max_grad_norm"] = 0.1 * t
        norms.append(step(optimizer))
        expected_lr.append(shown(optimizer))
        expected_clip.append([torch_clip(group["max_grad_norm"], norms[-1]) for group in optimizer.param_groups])
    rows = history.read()
    assert_rows(rows, list(range(20)), norms=norms, backend=backend)
    assert torch.equal(rows.lr, host(expected_lr))
    torch.testing.assert_close(rows.clip, host(expected_clip), rtol=norm_rtol(backend), atol=0.0)
    assert (rows.clip[:, [1, 2, 4]] == 1.0).all()
    assert len(rows.clip[:, 0].unique()) == 20
    assert all(tensor.device.type == "cpu" for tensor in rows[:5])


def test_a_norm_is_nan_where_it_is_not_measured_and_zero_without_gradients(backend: str) -> None:
    optimizer, history = recorded(backend)
    norms, clip = [], []
    for limit in (None, 0.5, None, 0.5):
        optimizer.param_groups[0]["max_grad_norm"] = limit
        norms.append(step(optimizer) * (1.0 if limit else torch.nan))
        clip.append(torch_clip(limit, norms[-1]))
    optimizer.zero_grad()
    optimizer.step()
    rows = history.read()
    assert_rows(rows, list(range(5)), norms=[*norms, host(0.0)], backend=backend)
    assert rows.clip[:, 0].tolist() == pytest.approx([*clip, 1.0], rel=norm_rtol(backend))
    assert_rates(rows.lr[:, 0], [SCHEDULE(t) for t in range(5)], optimizer)


@pytest.mark.parametrize("start", [2**24 + 1, 2**53 - 8])
def test_steps_are_exact(backend: str, start: int) -> None:
    optimizer, history = recorded(
        backend, capacity=4, lr=WSD(warmup_steps=2**52, stable_steps=2**52, decay_steps=2**50, peak_lr=1.0)
    )
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr_schedule"]["step"] = start
    optimizer.load_state_dict(saved)
    steps(optimizer, 6)
    assert_rows(history.read(), list(range(start + 2, start + 6)), overwritten=2)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_skipped_step_leaves_the_rates_it_would_have_used(backend: str, value: float) -> None:
    optimizer, history = recorded(
        backend,
        lr=WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=0.1),
        max_grad_norm=1.0,
        skip_nonfinite=True,
    )
    optimizer.add_param_group({"params": make_params([(6,)]), "lr": SCHEDULE, "max_grad_norm": None})
    completed: list[int] = []
    skips = [index % 4 == 0 or index == 5 for index in range(14)]
    for index, skip in enumerate(skips):
        before = shown(optimizer)
        step(optimizer, spoil=value if skip else None)
        assert not skip or shown(optimizer) == before
        completed.append(index - sum(skips[:index]))
    rows = history.read()
    assert_rows(rows, completed, skipped=skips)
    assert_rates(
        rows.lr,
        [[WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=0.1)(t), SCHEDULE(t)] for t in completed],
        optimizer,
    )
    assert torch.equal(rows.grad_norm.isfinite(), ~rows.skipped)
    clip = host([[torch_clip(1.0, norm), 1.0] for norm in rows.grad_norm])
    torch.testing.assert_close(rows.clip, clip, rtol=1e-12, atol=0.0, equal_nan=True)


def test_gradients_of_a_scaler(backend: str) -> None:
    optimizer, history = recorded(backend, max_grad_norm=0.5)
    optimizer.grad_scale = torch.tensor(8.0)
    norms = []
    for found in (0.0, 1.0, 1.0, 0.0):
        optimizer.found_inf = torch.tensor(found)
        norms.append(step(optimizer) / 8.0)
    rows = history.read()
    assert_rows(rows, [0, 1, 1, 1], norms=norms, skipped=[False, True, True, False], backend=backend)
    assert rows.clip[:, 0].tolist() == pytest.approx(
        [torch_clip(0.5, norm) for norm in norms], rel=norm_rtol(backend)
    )
    assert_rates(rows.lr[:, 0], [SCHEDULE(t) for t in (0, 1, 1, 1)], optimizer)


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_the_newest_rows_are_kept_and_the_others_counted(backend: str, capacity: int) -> None:
    optimizer, history = recorded(backend, capacity)
    t = 0
    read: list[tuple[HistoryRows, HistoryRows]] = []
    for count in (0, 1, capacity - 1, capacity, capacity + 1, 0, 3 * capacity + 2, 1):
        steps(optimizer, count)
        kept = min(count, capacity)
        t += count
        rows = history.read()
        assert_rows(rows, list(range(t - kept, t)), overwritten=count - kept)
        assert rows.lr.shape == rows.clip.shape == (kept, 1)
        assert_rates(rows.lr[:, 0], [SCHEDULE(s) for s in range(t - kept, t)], optimizer)
        read.append((rows, copy.deepcopy(rows)))
    for rows, as_read in read:  # what was read does not change
        assert same_bits(as_read[:3], rows[:3])


@pytest.mark.parametrize("before", [2, 4, 6])
def test_a_group_added_in_mid_run(backend: str, before: int) -> None:
    optimizer, history = recorded(backend, capacity=4, max_grad_norm=2.0)
    norms = steps(optimizer, before)
    optimizer.add_param_group({"params": make_params([(4,)]), "lr": 0.25, "max_grad_norm": None})
    assert optimizer.history(4) is history
    norms += steps(optimizer, 2)
    rows, kept = history.read(), list(range(before - 2, before + 2))
    assert_rows(rows, kept, overwritten=before - 2, norms=norms[-4:], backend=backend)
    assert_rates(rows.lr[:, 0], [SCHEDULE(t) for t in kept], optimizer)
    assert rows.lr[:, 1].nan_to_num(-1.0).tolist() == [-1.0, -1.0, 0.25, 0.25]
    assert rows.clip[:, 1].nan_to_num(-1.0).tolist() == [-1.0, -1.0, 1.0, 1.0]
    steps(optimizer, 9)
    rows = history.read()
    assert_rows(rows, list(range(before + 7, before + 11)), overwritten=5)
    assert rows.lr[:, 1].tolist() == [0.25] * 4


# Beside the optimizer's other doings.


def test_it_changes_no_bit_of_the_run_nor_of_a_checkpoint(backend: str) -> None:
    params = make_params([(33,), (4, 5)])
    options: dict[str, Any] = {"lr": SCHEDULE, "max_grad_norm": 1.0, "skip_nonfinite": True, "backend": backend}
    pair = [FusedAdamW(copies(params), **options) for _ in range(2)]
    pair[1].history(capacity=2)
    for t, optimizer in itertools.product(range(6), pair):
        torch.manual_seed(t)
        step(optimizer, spoil=torch.inf if t == 3 else None)
    plain, with_history = ([*snapshot(each), each.grad_norm, each.param_groups[0]["lr"]] for each in pair)
    assert same_bits(plain, with_history)
    saved = [each.state_dict() for each in pair]
    assert saved[0].keys() == saved[1].keys()
    assert saved[0]["param_groups"] == saved[1]["param_groups"]


def test_copies_have_none_and_loads_go_on(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(3,)]), lr=SCHEDULE, backend=backend)
    steps(optimizer, 3)
    history = optimizer.history(capacity=4)  # in mid-run
    assert_rows(history.read(), [])
    saved = copy.deepcopy(optimizer.state_dict())
    step(optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        step(other)
        theirs = other.history(capacity=7)
        assert theirs is not history
        step(other)
        assert_rows(theirs.read(), [5])
    step(optimizer)
    block = history.block
    optimizer.load_state_dict(saved)
    step(optimizer)
    assert_rows(history.read(), [3, 4, 3])
    assert history.block is block


BAD: list[tuple[Any, type[Exception], str]] = [
    *((value, ValueError, f"from 1 to 2147483648, got {value}") for value in (0, -1, 2**31 + 1)),
    *((value, TypeError, "from 1") for value in (2.0, True, "3", None)),
]


@pytest.mark.parametrize(("capacity", "error", "words"), BAD, ids=str)
def test_a_bad_capacity_is_refused(capacity: Any, error: type[Exception], words: str) -> None:
    optimizer = FusedAdamW(make_params([(3,)]))
    with pytest.raises(error, match=f"capacity must be an int {words}"):
        optimizer.history(capacity=capacity)
    history = optimizer.history(capacity=numpy.int64(3))
    with pytest.raises(ValueError, match=r"has a history of capacity=3, got 10000 \(int\)"):
        optimizer.history()
    assert history.capacity == 3


# The launches of the CUDA backend.


def test_it_takes_no_launch_and_no_memory_of_its_own(gpu: Shim) -> None:
    optimizer, history = recorded(NAME, capacity=3, max_grad_norm=1.0)
    step(optimizer)
    gpu.reset()
    for _ in range(4):
        optimizer.step()
    assert [launch.kernel for launch in gpu.launches()] == ["sum_squares", "prepare", "update_tensors"] * 4
    assert gpu.calls("allocate") == gpu.calls("cudaStreamSynchronize") == 0
    assert_rows(history.read(), [2, 3, 4], overwritten=2)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("before", [2, 3, 4])
def test_a_launch_that_fails_leaves_no_row(gpu: Shim, nth: int, before: int) -> None:
    optimizer, history = recorded(NAME, capacity=3, max_grad_norm=1.0)
    norms = steps(optimizer, before)
    gpu.fail(LAUNCH_FAILURE, nth)
    with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
        step(optimizer)
    rows, kept = history.read(), list(range(before))[-3:]
    assert_rows(rows, kept, overwritten=before - len(kept), norms=norms[-3:])  # also the oldest is whole
    assert_rates(rows.lr[:, 0], [SCHEDULE(t) for t in kept], optimizer)
    step(optimizer)
    assert_rows(history.read(), [before])


@pytest.mark.usefixtures("gpu")
def test_replays_of_a_captured_step_leave_rows() -> None:
    optimizer, history = recorded(NAME, capacity=8, max_grad_norm=1.0, skip_nonfinite=True)
    step(optimizer)
    assert_rows(history.read(), [0])
    graph = captured_step(optimizer)
    assert_rows(history.read(), [])
    (param,) = params_of(optimizer)
    grad: Any = param.grad
    norms = []
    for index in range(12):
        grad.copy_(make_grads([param])[0])
        if index == 5:
            grad[0] = torch.inf
        norms.append(grad.double().norm())
        graph.replay()
    rows, kept = history.read(), [5, 6, 6, 7, 8, 9, 10, 11]
    assert_rows(rows, kept, overwritten=4, norms=norms[-8:], skipped=[index == 1 for index in range(8)])
    assert rows.lr[:, 0].tolist() == [SCHEDULE(t) for t in kept]
    # Beside a group that is added, the graph writes what nobody reads, where nothing else is.
    optimizer.add_param_group({"params": make_params([(7,)])})
    step(optimizer)
    graph.replay()
    assert_rows(history.read(), [12])


def test_of_several_devices_the_first_records(gpu: Shim) -> None:
    optimizer, history = recorded(NAME, max_grad_norm=0.5)
    optimizer.add_param_group({"params": make_params([(7,)])})
    set_grads(params_of(optimizer), make_grads(params_of(optimizer)))
    runner = engine_of(optimizer).prepare(vars(optimizer))
    plan = engine_of(optimizer).make_plan(vars(optimizer))
    (whole,) = plan.devices.values()
    split = {}
    for index, entry in enumerate(whole.entries):
        state = StepState(torch.device("cpu"), False, 0)
        state.device = torch.device("cpu", index)
        split[state.device] = DevicePlan(state, whole.groups, [entry], True)
    history.attach(next(iter(split.values())))
    gpu.set_devices(count=2)
    runner.bind(Plan(plan.parameters, split), vars(optimizer))
    for _ in range(3):
        runner.step(None, None)
    norm = torch.cat([param.grad.double() for param in params_of(optimizer)]).norm()  # over both
    assert_rows(history.read(), [0, 1, 2], norms=[norm] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_replays_on_a_gpu_leave_rows(name: str) -> None:
    with tensors_where_it_runs(name):
        optimizer, history = recorded(name, capacity=40, max_grad_norm=1.0)
        optimizer.add_param_group({"params": make_params([(70_000,)])})
        step(optimizer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        norms = []
        for _ in range(50):
            for param in params_of(optimizer):
                param.grad.copy_(make_grads([param])[0])
            graph.replay()
            norms.append(optimizer.grad_norm.clone())
        rows = history.read()
        assert_rows(rows, list(range(11, 51)), overwritten=11)
        assert_rates(rows.lr[:, 0], [SCHEDULE(t) for t in range(11, 51)], optimizer)
        assert torch.equal(rows.grad_norm, torch.stack(norms[-40:]).cpu())
