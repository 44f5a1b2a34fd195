"""State dicts: interchange with torch, resuming to the same bits, loading in place; and copies."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_on_cpu import NAME, captured_step
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
    step_both,
    through_a_file,
)
from side_by_side import fused_torch, params_of, state_of, train, train_alike
from torch.optim.lr_scheduler import LambdaLR

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant, Cosine, CosineRestarts, Schedule

SHAPES = [(5,), (3, 4), ()]
SAVED = WSD(warmup_steps=5, stable_steps=10, decay_steps=12, peak_lr=0.1)


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
    own = make_params(SHAPES)
    reference = Float64AdamW(own, **options)
    optimizers: list[Any] = [
        torch.optim.AdamW(own, **options, **kind),
        FusedAdamW(own, lr=0.5, backend=backend),  # options come from the checkpoint
        fused_torch(own, lr=0.7),
        FusedAdamW(own, backend=backend),
    ]
    step_both(optimizers[0], reference, steps=10)
    for last, optimizer in itertools.pairwise(optimizers):
        optimizer.load_state_dict(through_a_file(last.state_dict()))
        step_both(optimizer, reference, steps=10)
    assert_same_run(optimizers[3], reference)
    assert optimizers[3].param_groups[0]["betas"] == (0.8, 0.99)
    assert optimizers[3].param_groups[0]["lr"] == 1e-2


def test_torchs_scheduled_run_goes_on_with_a_schedule(backend: str) -> None:
    schedule, own = WSD(warmup_steps=5, stable_steps=10, decay_steps=15, peak_lr=0.1), make_params(SHAPES)
    reference = Float64AdamW(own, lr=schedule)
    first: Any = torch.optim.AdamW(own, lr=1.0)
    scheduler = LambdaLR(first, schedule)
    for _ in range(12):
        step_both(first, reference, steps=1)
        scheduler.step()
    second = FusedAdamW(own, lr=schedule, backend=backend)
    second.load_state_dict(first.state_dict())
    assert float(second.param_groups[0]["lr"]) == schedule(12)
    step_both(second, reference, steps=18)
    assert_same_run(second, reference)


# Resuming.


RESUMED: dict[str, Callable[[], dict[str, Any]]] = {
    "wsd": lambda: {"lr": WSD(warmup_steps=5, stable_steps=10, decay_steps=12, peak_lr=0.1, min_lr=0.01)},
    "open-ended": lambda: {
        "lr": WSD(warmup_steps=5, stable_steps=None, decay_steps=12, peak_lr=0.1, min_lr=0.01, decay_type="sqrt")
    },
    "restarts": lambda: {
        "lr": CosineRestarts(peak_lr=0.1, min_lr=0.01, cycle_length=4, cycle_mult=2.0, warmup_steps=3),
        "weight_decay": Cosine(peak_lr=0.3, total_steps=25),
    },
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

    start = make_params(SHAPES, dtype)
    whole, interrupted = begin(start), begin(start)
    train_alike(whole, interrupted, steps=8)
    if decays:
        whole.begin_decay()
        interrupted.begin_decay()
    train_alike(whole, interrupted, steps=5)
    resumed = begin(params_of(interrupted))
    resumed.load_state_dict(through_a_file(interrupted.state_dict()))
    train_alike(whole, resumed, steps=17)
    assert same_bits(snapshot(whole), snapshot(resumed))
    rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in (whole, resumed)]
    assert rates[0] == rates[1]
    if dtype == torch.bfloat16:
        assert state_of(resumed)["exp_avg"].dtype == torch.float32


def test_extended_and_ended_runs_resume(backend: str) -> None:
    schedule = WSD(warmup_steps=3, stable_steps=5, decay_steps=6, peak_lr=0.1)
    optimizer, fresh = (FusedAdamW(make_params(SHAPES), lr=schedule, backend=backend) for _ in range(2))
    train(optimizer, 4)
    optimizer.extend_stable(10)
    saved = through_a_file(optimizer.state_dict())
    optimizer.begin_decay()  # is undone by loading
    for each in (optimizer, fresh):
        each.load_state_dict(saved)
        for t in range(4, 30):
            train(each, 1)
            assert float(each.param_groups[0]["lr"]) == pytest.approx(schedule.extend_stable(10)(t), rel=1e-15)


# Loading in place.


def test_counters_and_rates_are_loaded_in_place(backend: str) -> None:
    lr = torch.tensor(0.1)
    options = {"lr": lr, "weight_decay": Constant(0.1), "amsgrad": True}
    optimizer = FusedAdamW(make_params(SHAPES, torch.bfloat16), backend=backend, **options)

    def kept() -> list[torch.Tensor]:
        return [*(optimizer.param_groups[0][name] for name in ("lr", "weight_decay")), optimizer.skipped_steps]

    def moments() -> list[torch.Tensor]:
        return [value for value in snapshot(optimizer) if value.dtype != torch.bfloat16]

    train(optimizer)
    saved, expected = copy.deepcopy(optimizer.state_dict()), moments()
    tensors, addresses = kept(), [tensor.data_ptr() for tensor in kept()]
    train(optimizer, 2)
    lr.fill_(0.7)
    optimizer.load_state_dict(through_a_file(saved))
    assert all(a is b for a, b in zip(tensors, kept(), strict=True))
    assert addresses == [tensor.data_ptr() for tensor in kept()]
    assert float(lr) == pytest.approx(0.1)
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert same_bits(moments(), expected)


@pytest.mark.usefixtures("gpu")
def test_moments_that_a_graph_points_to_are_loaded_in_place() -> None:
    params = make_params(SHAPES)
    grads = make_grads(params)
    optimizer = FusedAdamW(params, lr=0.1, amsgrad=True, backend=NAME)
    reference = Float64AdamW(params, lr=0.1, amsgrad=True)
    step_both(optimizer, reference, steps=1, grads=grads)
    saved, values = copy.deepcopy(optimizer.state_dict()), copies(params)
    graph = captured_step(optimizer)
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


# Copies.


def beside_its_weights(optimizer: FusedAdamW) -> FusedAdamW:
    """Saved whole, in one file with its parameters."""
    saved = through_a_file({"weights": params_of(optimizer), "optimizer": optimizer}, weights_only=False)
    copied: FusedAdamW = saved["optimizer"]
    assert all(a is b for a, b in zip(saved["weights"], params_of(copied), strict=True))
    return copied


def of_the_original(*_: Any) -> None:
    raise AssertionError("torch leaves hooks out of copies")


COPIES: dict[str, Callable[[FusedAdamW], FusedAdamW]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "a file": beside_its_weights,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("steps", [0, 4])
def test_a_copied_optimizer_goes_on_the_same(
    backend: str, copied: Callable[[FusedAdamW], FusedAdamW], steps: int
) -> None:
    groups, lr = (
        [{"params": make_params(SHAPES), "lr_scale": 0.5}],
        WSD(warmup_steps=2, stable_steps=None, decay_steps=5, peak_lr=0.1),
    )
    optimizer = FusedAdamW(groups, lr=lr, max_grad_norm=1.0, skip_nonfinite=True, backend=backend)
    train(optimizer, steps)
    if steps:
        optimizer.begin_decay()
    handle = optimizer.register_step_post_hook(of_the_original)
    other = copied(optimizer)
    handle.remove()
    assert other.backend == backend
    before, rounds = snapshot(optimizer), [make_grads(params_of(optimizer)) for _ in range(5)]
    for each in (other, optimizer):
        assert same_bits(snapshot(optimizer), before)  # which the copy does not touch
        for grads in rounds:
            set_grads(params_of(each), grads)
            each.step()
    assert same_bits(snapshot(optimizer), snapshot(other))
    assert float(optimizer.param_groups[0]["lr"]) == float(other.param_groups[0]["lr"])
    assert torch.equal(optimizer.grad_norm, other.grad_norm)


# Schedules that differ.


DIFFERENT: dict[str, tuple[Any, list[str], float]] = {
    "numbers": (
        WSD(warmup_steps=5, stable_steps=11, decay_steps=12, peak_lr=0.2),
        [r"lr_schedule.peak_lr was 0\.1", "lr_schedule.stable_steps was 10"],
        WSD(warmup_steps=5, stable_steps=11, decay_steps=12, peak_lr=0.2)(6),  # the counter is the saved one
    ),
    "kind": (
        Cosine(peak_lr=0.1, total_steps=100),
        ["lr_schedule.type was 'WSD' in the checkpoint and is 'C"],
        Cosine(peak_lr=0.1, total_steps=100)(6),
    ),
    "none": (0.3, [r"lr was driven by a schedule, WSD.*lr=WSD\(\.\.\.\) to go on"], SAVED(5)),
}


@pytest.mark.parametrize(("lr", "said", "rate"), DIFFERENT.values(), ids=DIFFERENT)
def test_every_difference_of_the_schedule_is_said(backend: str, lr: Any, said: list[str], rate: float) -> None:
    first, second = (FusedAdamW(make_params(SHAPES), lr=each, backend=backend) for each in (SAVED, lr))
    train(first, 6)
    with pytest.warns(UserWarning, match="lr") as caught:
        second.load_state_dict(first.state_dict())
    told = sorted(str(warning.message) for warning in caught)
    assert all(re.search(words, message) for words, message in zip(said, told, strict=True))
    assert all(warning.filename == __file__ for warning in caught)
    assert float(second.param_groups[0]["lr"]) == float(first.param_groups[0]["lr"])  # the rate last used
    train(second, 1)
    assert float(second.param_groups[0]["lr"]) == pytest.approx(rate, rel=1e-15)


@pytest.mark.parametrize("limit", [1.0, torch.tensor(1.0)], ids=["a number", "a tensor"])
def test_a_saved_limit_of_0_is_none(limit: Any) -> None:
    saved = FusedAdamW([torch.zeros(2, requires_grad=True)], max_grad_norm=1.0).state_dict()
    saved["param_groups"][0]["max_grad_norm"] = 0.0
    optimizer = FusedAdamW([torch.zeros(2, requires_grad=True)], max_grad_norm=limit)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["max_grad_norm"] is None
    assert float(limit) == 1.0
