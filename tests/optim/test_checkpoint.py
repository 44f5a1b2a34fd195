"""State dicts: interchange with torch, resuming to the same bits, loading in place; and copies."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
from collections.abc import Callable
from typing import Any

import cuda_on_cpu
import pytest
import torch
from references import (
    Float64AdamW,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
)
from side_by_side import fused_torch, params_of, state_of
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Constant, Cosine, CosineRestarts, Schedule

SHAPES = [(5,), (3, 4), ()]
SAVED = WSD(5, 10, 12, 0.1)


def run(optimizer: torch.optim.Optimizer, rounds: list[list[Tensor]]) -> None:
    params = params_of(optimizer)
    for grads in rounds:
        set_grads(params, [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)])
        optimizer.step()


def make_rounds(count: int) -> list[list[Tensor]]:
    return [make_grads([torch.zeros(shape) for shape in SHAPES]) for _ in range(count)]


def written_and_read(saved: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as torch reads it by default: plain types and tensors alone."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Interchange with torch.optim.AdamW, in the middle of a run.


@pytest.mark.parity(
    "State dicts",
    "a state dict of the other optimizer",
    torch="`FusedAdamW`'s is loaded, and the run goes on as if it were its own",
    nexus="torch's is loaded, and the run goes on as if it were its own",
    why="a run can go from the one to the other and back",
    also=("test_checkpoint.py::test_torchs_scheduled_run_goes_on_with_a_schedule",),
)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_a_run_goes_from_torch_to_nexus_and_back(backend: str, kind: dict[str, bool], amsgrad: bool) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.99), "amsgrad": amsgrad}
    start = make_params(SHAPES)
    rounds = make_rounds(30)
    reference = Float64AdamW(start, **options)
    for grads in rounds:
        reference.step(grads)

    own = copies(start)
    optimizers = [
        torch.optim.AdamW(own, **options, **kind),
        FusedAdamW(own, lr=0.5, backend=backend),  # options come from the checkpoint
        fused_torch(own, lr=0.7),
        FusedAdamW(own, backend=backend),
    ]
    run(optimizers[0], rounds[:10])
    for index, (last, optimizer) in enumerate(itertools.pairwise(optimizers), start=1):
        optimizer.load_state_dict(written_and_read(last.state_dict()))
        run(optimizer, rounds[10 * index : 10 * index + 10])
    assert_same_run(optimizers[3], reference)
    assert optimizers[3].param_groups[0]["betas"] == (0.8, 0.99)
    assert optimizers[3].param_groups[0]["lr"] == 1e-2


def test_torchs_scheduled_run_goes_on_with_a_schedule(backend: str) -> None:
    schedule = WSD(5, 10, 15, 0.1)
    start = make_params(SHAPES)
    rounds = make_rounds(30)
    own = copies(start)
    first = torch.optim.AdamW(own, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(first, schedule)
    for grads in rounds[:12]:
        run(first, [grads])
        scheduler.step()
    second = FusedAdamW(own, lr=schedule, backend=backend)
    second.load_state_dict(first.state_dict())
    assert float(second.param_groups[0]["lr"]) == schedule(12)
    run(second, rounds[12:])
    reference = Float64AdamW(start, lr=schedule)
    for grads in rounds:
        reference.step(grads)
    assert_same_run(second, reference)


# Resuming.


RESUMED: dict[str, Callable[[], dict[str, Any]]] = {
    "wsd": lambda: {"lr": WSD(5, 10, 12, 0.1, 0.01)},
    "open-ended": lambda: {"lr": WSD(5, None, 12, 0.1, 0.01, "sqrt")},
    "restarts": lambda: {"lr": CosineRestarts(0.1, 0.01, 4, 2.0, 3), "weight_decay": Cosine(0.3, 25)},
    "tensor": lambda: {"lr": torch.tensor(0.03), "amsgrad": True},
    "float": lambda: {"lr": 0.03, "max_grad_norm": 1.0, "maximize": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "decays"), [*((name, False) for name in RESUMED), ("wsd", True), ("open-ended", True)]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    backend: str, name: str, decays: bool, dtype: torch.dtype
) -> None:
    def begin(start: list[torch.nn.Parameter]) -> FusedAdamW:
        own, options = copies(start), RESUMED[name]()
        scale = 0.5 if isinstance(options["lr"], Schedule) else 1.0
        groups = [{"params": own[:1]}, {"params": own[1:], "lr_scale": scale}]
        return FusedAdamW(groups, backend=backend, **options)

    start, rounds = make_params(SHAPES, dtype), make_rounds(30)
    whole, interrupted = begin(start), begin(start)
    for optimizer in (whole, interrupted):
        run(optimizer, rounds[:8])
        if decays:
            optimizer.begin_decay()
        run(optimizer, rounds[8:13])
    resumed = begin(params_of(interrupted))
    resumed.load_state_dict(written_and_read(interrupted.state_dict()))
    for optimizer in (whole, resumed):
        run(optimizer, rounds[13:])
    assert same_bits(snapshot(whole), snapshot(resumed))
    rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in (whole, resumed)]
    assert rates[0] == rates[1]
    if dtype == torch.bfloat16:
        assert state_of(resumed)["exp_avg"].dtype == torch.float32


def test_extended_and_ended_runs_resume(backend: str) -> None:
    schedule = WSD(3, 5, 6, 0.1)
    params = make_params(SHAPES)
    optimizer = FusedAdamW(params, lr=schedule, backend=backend)
    run(optimizer, make_rounds(4))
    optimizer.extend_stable(10)
    saved = written_and_read(optimizer.state_dict())
    optimizer.begin_decay()  # is undone by loading
    optimizer.load_state_dict(saved)
    fresh = FusedAdamW(copies(params), lr=schedule, backend=backend)
    fresh.load_state_dict(saved)
    expected = schedule.extend_stable(10)
    for t in range(4, 30):
        for each in (optimizer, fresh):
            run(each, make_rounds(1))
            assert float(each.param_groups[0]["lr"]) == pytest.approx(expected(t), rel=1e-15)


def test_counters_and_rates_are_loaded_in_place(backend: str) -> None:
    params = make_params(SHAPES, torch.bfloat16)
    lr = torch.tensor(0.1)
    optimizer = FusedAdamW(params, lr=lr, weight_decay=Constant(0.1), amsgrad=True, backend=backend)
    run(optimizer, make_rounds(3))
    saved = copy.deepcopy(optimizer.state_dict())
    expected = snapshot(optimizer)
    tensors = [lr, optimizer.param_groups[0]["weight_decay"], optimizer.skipped_steps]
    addresses = [tensor.data_ptr() for tensor in tensors]
    with torch.no_grad():
        for param, value in zip(params, copies(params), strict=True):
            param.copy_(value)
    run(optimizer, make_rounds(2))
    lr.fill_(0.7)
    optimizer.load_state_dict(written_and_read(saved))
    now = [optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"], optimizer.skipped_steps]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert addresses == [tensor.data_ptr() for tensor in now]
    assert float(lr) == pytest.approx(0.1)
    for param in params:
        assert optimizer.state[param]["exp_avg"].dtype == torch.float32
    states = [value for value in snapshot(optimizer) if value.dtype != torch.bfloat16]
    assert same_bits(states, [value for value in expected if value.dtype != torch.bfloat16])


def test_moments_that_a_graph_points_to_are_loaded_in_place() -> None:
    gpu = cuda_on_cpu.shim()
    gpu.reset()
    params, grads = make_params(SHAPES), make_grads(make_params(SHAPES))
    optimizer = FusedAdamW(params, lr=0.1, amsgrad=True, backend=cuda_on_cpu.NAME)
    reference = Float64AdamW(params, lr=0.1, amsgrad=True)
    set_grads(params, grads)
    optimizer.step()
    reference.step(grads)
    saved, values = copy.deepcopy(optimizer.state_dict()), copies(params)
    runner: Any = engine_of(optimizer).prepare(vars(optimizer))
    runner.stream = gpu.stream()
    with gpu.capture(runner.stream) as graph:
        optimizer.step()
    runner.stream = 0
    tensors = [value for param in params for value in optimizer.state[param].values()]
    for _ in range(3):
        graph.replay()
    optimizer.state[params[0]]["mine"] = 1
    optimizer.load_state_dict(saved)
    now = [value for param in params for value in optimizer.state[param].values()]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    for _ in range(2):
        graph.replay()
        reference.step(grads)
    assert_same_run(optimizer, reference)
    saved["state"].pop(0)  # which has never had a gradient, then
    optimizer.load_state_dict(saved)
    assert not any(value.any() for value in optimizer.state[params[0]].values())


def test_state_of_the_shape_that_a_parameter_had_before_gives_way(backend: str) -> None:
    params = make_params([(5,), (3, 4)])
    optimizer, other = (run_beside_torch(params, backend)[0] for _ in range(2))
    saved = other.state_dict()
    saved["state"][1] = {name: value[:2, :2] if value.dim() else value for name, value in saved["state"][1].items()}
    params[1].data = torch.ones(2, 2)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[1]]["exp_avg"], saved["state"][1]["exp_avg"])
    params[1].grad = torch.ones(2, 2)
    optimizer.step()


def through_a_file(optimizer: FusedAdamW) -> FusedAdamW:
    """Saved whole, beside its parameters."""
    file = io.BytesIO()
    torch.save({"weights": optimizer.param_groups[0]["params"], "optimizer": optimizer}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    copied: FusedAdamW = saved["optimizer"]
    assert all(a is b for a, b in zip(saved["weights"], copied.param_groups[0]["params"], strict=True))
    return copied


def of_the_original(*_: Any) -> None:
    raise AssertionError("torch leaves hooks out of copies")


COPIES: dict[str, Callable[[FusedAdamW], FusedAdamW]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "a file": through_a_file,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("steps", [0, 4])
def test_a_copied_optimizer_goes_on_the_same(
    backend: str, copied: Callable[[FusedAdamW], FusedAdamW], steps: int
) -> None:
    groups, lr = [{"params": make_params(SHAPES), "lr_scale": 0.5}], WSD(2, None, 5, 0.1)
    optimizer = FusedAdamW(groups, lr=lr, max_grad_norm=1.0, skip_nonfinite=True, backend=backend)
    run(optimizer, make_rounds(steps))
    if steps:
        optimizer.begin_decay()
    handle = optimizer.register_step_post_hook(of_the_original)
    other = copied(optimizer)
    handle.remove()
    assert other.backend == backend
    before, rounds = snapshot(optimizer), make_rounds(5)
    run(other, rounds)
    assert same_bits(snapshot(optimizer), before)
    run(optimizer, rounds)
    assert same_bits(snapshot(optimizer), snapshot(other))
    assert float(optimizer.param_groups[0]["lr"]) == float(other.param_groups[0]["lr"])
    assert torch.equal(optimizer.grad_norm, other.grad_norm)


# Schedules that differ.


DIFFERENT: dict[str, tuple[Any, list[str], float]] = {
    "numbers": (
        WSD(5, 11, 12, 0.2),
        [r"lr_schedule.peak_lr was 0\.1", "lr_schedule.stable_steps was 10"],
        WSD(5, 11, 12, 0.2)(6),  # the counter is the saved one
    ),
    "kind": (Cosine(0.1, 100), ["lr_schedule.type was 'WSD' in the checkpoint and is 'C"], Cosine(0.1, 100)(6)),
    "none": (0.3, [r"lr was driven by a schedule, WSD.*lr=WSD\(\.\.\.\) to go on"], SAVED(5)),
}


@pytest.mark.parametrize(("lr", "said", "rate"), DIFFERENT.values(), ids=DIFFERENT)
def test_every_difference_of_the_schedule_is_said(backend: str, lr: Any, said: list[str], rate: float) -> None:
    first = FusedAdamW(make_params(SHAPES), lr=SAVED, backend=backend)
    run(first, make_rounds(6))
    second = FusedAdamW(make_params(SHAPES), lr=lr, backend=backend)
    with pytest.warns(UserWarning, match="lr") as caught:
        second.load_state_dict(first.state_dict())
    told = sorted(str(warning.message) for warning in caught)
    assert all(re.search(words, message) for words, message in zip(said, told, strict=True))
    assert all(warning.filename == __file__ for warning in caught)
    assert float(second.param_groups[0]["lr"]) == float(first.param_groups[0]["lr"])  # the rate last used
    run(second, make_rounds(1))
    assert float(second.param_groups[0]["lr"]) == pytest.approx(rate, rel=1e-15)
