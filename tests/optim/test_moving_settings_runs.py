"""Settings that move, through all that a run goes through: skipped steps, graphs, backward passes, checkpoints."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_worlds import World, plain_step, train
from cuda_on_cpu import NAME
from graphs_on_cpu import Graphs
from references import copies, make_grads, make_params, same_bits, set_grads, snapshot
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# isort: split
import triton_interpreter  # noqa: F401  # mends it

from nexus.backends import triton
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Constant, Linear, Schedule
from nexus.training import step_in_backward

BETA1, BETA2 = Linear(start_lr=0.95, end_lr=0.8, total_steps=10), Linear(start_lr=0.9, end_lr=0.999, total_steps=12)
MOVING: dict[str, Any] = {
    "lr": WSD(warmup_steps=3, stable_steps=10, decay_steps=8, peak_lr=1e-2, min_lr=1e-3),
    "betas": (BETA1, BETA2),
    "eps": Linear(start_lr=1e-2, end_lr=1e-8, total_steps=15),
    "max_grad_norm": Linear(start_lr=0.5, end_lr=4.0, total_steps=15),
    "lr_scale": Linear(start_lr=0.2, end_lr=1.0, total_steps=9),
}
SHAPES = [(), (7,), (130, 5)]


def make(params: list[torch.nn.Parameter], backend: str, **options: Any) -> FusedAdamW:
    """An optimizer of one group whose settings move, or are those of `options`."""
    of_all = {name: options.pop(name) for name in ("skip_nonfinite", "bias_correction") if name in options}
    return FusedAdamW([{"params": params, **MOVING, **options}], backend=backend, **of_all)


def run(optimizer: FusedAdamW, first: int, last: int) -> None:
    params = optimizer.param_groups[0]["params"]
    for step in range(first, last):
        torch.manual_seed(step)
        set_grads(params, make_grads(params))
        optimizer.step()


def products(optimizer: FusedAdamW) -> list[float]:
    """Of the last parameter: of the first betas, of the second betas, and the count that they are of."""
    values: list[float] = optimizer.state[optimizer.param_groups[0]["params"][-1]]["beta_products"].tolist()
    return values


def product(schedule: Schedule, steps: int) -> float:
    found = 1.0
    for step in range(steps):
        found *= schedule(step)
    return found


# Steps.


def test_a_skipped_step_moves_nothing(backend: str) -> None:
    optimizer = make(make_params(SHAPES), backend, skip_nonfinite=True)
    run(optimizer, 0, 5)
    before = snapshot(optimizer)
    params = optimizer.param_groups[0]["params"]
    set_grads(params, [torch.full_like(param, float("nan")) for param in params])
    optimizer.step()
    assert same_bits(before, snapshot(optimizer))
    assert int(optimizer.skipped_steps) == 1
    run(optimizer, 5, 9)
    assert products(optimizer) == pytest.approx([product(BETA1, 9), product(BETA2, 9), 9.0], rel=1e-15)


class NothingIsRead(TorchDispatchMode):
    """Forbids what waits for a device: to ask a tensor for its number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back(backend: str) -> None:
    if backend == "torch":
        pytest.skip("on the CPU, where nothing waits, it reads whether to skip")
    optimizer = make(make_params(SHAPES), backend, skip_nonfinite=True)
    params = optimizer.param_groups[0]["params"]
    for _ in range(3):
        set_grads(params, make_grads(params))
        with NothingIsRead():
            optimizer.step()
    assert products(optimizer)[2] == 3.0
    with NothingIsRead(), pytest.raises(AssertionError):
        float(params[0])


def test_each_parameter_has_products_of_its_own_updates(backend: str) -> None:
    params = make_params([(4,), (4,)])
    optimizer = make(params, backend)
    for step in range(8):
        grads = make_grads(params)
        set_grads(params, [grads[0], grads[1] if step in (2, 5) else None])
        optimizer.step()
    assert products(optimizer) == pytest.approx([BETA1(2) * BETA1(5), BETA2(2) * BETA2(5), 2.0], rel=1e-15)
    assert optimizer.state[params[0]]["beta_products"].tolist()[2] == 8.0


def test_updates_in_the_backward_pass_are_those_of_the_plain_loop(backend: str) -> None:
    runs = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        group = {"params": list(model.parameters()), **MOVING, "max_grad_norm": None}
        optimizer = FusedAdamW([group], backend=backend)
        if in_backward:
            step_in_backward(model, optimizer)
        for step in range(9):
            torch.manual_seed(step)
            if step == 5:
                group = optimizer.param_groups[0]
                group["betas"] = (torch.tensor(0.7), BETA2)
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([*snapshot(optimizer)])
    assert same_bits(*runs)


INTERPRETED = pytest.param("triton", marks=pytest.mark.skipif(not triton.INTERPRETS, reason="Triton runs on the GPU"))


@pytest.mark.parametrize("backend", [NAME, INTERPRETED])
def test_captured_steps_equal_plain_ones(backend: str, graphs: Graphs) -> None:
    ends = []
    for captured in (False, True):
        tensor = torch.tensor(0.9)
        options = {**MOVING, "betas": (tensor, BETA2)}
        options.pop("lr_scale")
        world = World(backend, captured, **options, skip_nonfinite=True)
        world.optimizer.param_groups[0]["lr_scale"] = MOVING["lr_scale"]
        step = world.step(plain_step(world))
        train(world, step, 6)
        tensor.fill_(0.6)  # between replays
        for index in range(6, 9):
            x, y = world.batch(index)
            step(x * (float("nan") if index == 7 else 1.0), y)
        ends.append(world.state())
    assert same_bits(*ends)
    assert "replay" in graphs.events


def test_a_graph_does_not_begin_to_keep_products(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step = world.step(plain_step(world))
    train(world, step, 5)
    before = world.state()
    world.optimizer.param_groups[0]["betas"] = (0.9, BETA2)
    with pytest.raises(RuntimeError, match=r"betas or bias_correction were changed .*drop the graph first"):
        step(*world.batch(5))
    assert same_bits(before, world.state())
    world.optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    step(*world.batch(5))
    world.optimizer.param_groups[0]["betas"] = (0.9, BETA2)
    step.reset()
    for index in range(6, 11):
        step(*world.batch(index))
    assert graphs.events.count("capture") == 2
    assert products(world.optimizer)[2] == 11.0


# What is assigned in mid-run.


def test_products_begin_as_powers_of_the_betas_of_the_moment(backend: str) -> None:
    start = make_params(SHAPES)
    optimizer = make(copies(start), backend, betas=(0.8, 0.95))
    run(optimizer, 0, 6)
    assert "beta_products" not in optimizer.state[optimizer.param_groups[0]["params"][0]]
    later = Linear(start_lr=0.9, end_lr=0.99, total_steps=20)
    optimizer.param_groups[0]["betas"] = (Constant(0.8), later)
    run(optimizer, 6, 8)
    assert products(optimizer) == pytest.approx([0.8**8, later(6) ** 7 * later(7), 8.0], rel=1e-14)
    optimizer.param_groups[0]["betas"] = (0.8, 0.5)  # nothing is kept, and what was is out of date
    run(optimizer, 8, 9)
    optimizer.param_groups[0]["betas"] = (0.8, later)
    run(optimizer, 9, 10)
    assert products(optimizer) == pytest.approx([0.8**10, later(9) ** 10, 10.0], rel=1e-14)


def test_a_schedule_or_a_number_takes_the_place_of_another(backend: str) -> None:
    optimizer = make(make_params(SHAPES), backend)
    run(optimizer, 0, 3)
    group = optimizer.param_groups[0]
    group["betas"] = (Constant(0.5), 0.75)
    group["eps"] = 1e-4
    group["max_grad_norm"] = None
    group["lr_scale"] = torch.tensor(0.5)
    run(optimizer, 3, 5)
    assert float(group["lr"]) == pytest.approx(0.5 * MOVING["lr"](4), rel=1e-7)
    assert products(optimizer) == pytest.approx([product(BETA1, 3) * 0.25, product(BETA2, 3) * 0.75**2, 5], rel=1e-14)
    assert {schedule for schedule, _ in engine_of(optimizer).tables} == {MOVING["lr"], Constant(0.5)}


def test_a_rate_of_two_groups_is_scaled_by_the_one_that_has_its_schedule(backend: str) -> None:
    first, second = make_params([(3,), (3,)])
    optimizer = FusedAdamW(
        [{"params": [first], "lr_scale": Constant(0.25)}, {"params": [second]}], lr=Constant(0.5), backend=backend
    )
    group = optimizer.param_groups[1]
    group["lr_schedule"] = None
    group["lr"] = optimizer.param_groups[0]["lr"]
    before = second.detach().clone()
    set_grads([first, second], [torch.ones(3), torch.ones(3)])
    optimizer.step()
    torch.testing.assert_close(before - second.detach(), 0.125 * (1.0 + 0.01 * before), rtol=1e-5, atol=0.0)
    group["lr"] = 0.1
    group["eps"] = optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"a group's eps is the tensor .* by its lr_scale: give that group"):
        optimizer.step()


def test_what_would_be_ignored_is_refused(backend: str) -> None:
    optimizer = make(make_params(SHAPES), backend, lr=1e-2)
    for scale in (Constant(0.5), torch.tensor(0.5)):
        optimizer.param_groups[0]["lr_scale"] = scale
        with pytest.raises(ValueError, match=r"which multiplies schedules, and the rate is 0\.01"):
            run(optimizer, 0, 1)


BAD: dict[str, tuple[str, Any, str]] = {
    "a beta that reaches 1": (
        "betas",
        (0.9, Linear(start_lr=0.9, end_lr=1.0, total_steps=10)),
        r"betas\[1\] must stay in \[0, 1\).* at step 10",
    ),
    "within a cycle": (
        "betas",
        (Linear(start_lr=1.0, end_lr=0.5, total_steps=10).repeat(), 0.9),
        r"betas\[0\] must stay in .* 1.0 at step 0",
    ),
    "at a sample": (
        "betas",
        (0.9, Schedule.from_function(lambda t: 1.5 if t == 7 else 0.5, 20)),
        r"betas\[1\] must stay in .* 1.5 at step 7",
    ),
    "no norm": (
        "max_grad_norm",
        WSD(warmup_steps=3, stable_steps=5, decay_steps=4, peak_lr=1.0),
        "max_grad_norm must stay above 0.* is 0.0 at step 0",
    ),
    "two numbers": ("eps", torch.ones(2), "eps as a tensor must have one element"),
    "no number": ("lr_scale", torch.tensor(float("nan")), "lr_scale must be a finite number >= 0"),
}


@pytest.mark.parametrize(("name", "value", "words"), BAD.values(), ids=BAD)
def test_bad_settings_are_named_and_change_nothing(name: str, value: Any, words: str, backend: str) -> None:
    optimizer = make(make_params(SHAPES), backend)
    run(optimizer, 0, 2)
    before = snapshot(optimizer)
    good = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=words):
        run(optimizer, 2, 3)
    assert same_bits(before, snapshot(optimizer))
    optimizer.param_groups[0][name] = good
    run(optimizer, 2, 3)


# Checkpoints and copies.


def loaded(optimizer: FusedAdamW) -> FusedAdamW:
    own = make(copies(optimizer.param_groups[0]["params"]), optimizer.backend)
    own.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    return own


COPIES: dict[str, Callable[[FusedAdamW], FusedAdamW]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),  # type: ignore[no-any-return]
    "state_dict": loaded,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_run_goes_on_bit_for_bit(copied: Callable[[FusedAdamW], FusedAdamW], backend: str) -> None:
    optimizer = make(make_params(SHAPES), backend)
    run(optimizer, 0, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = copied(optimizer)
    for each in (optimizer, other):
        run(each, 7, 14)
    assert same_bits(snapshot(optimizer), snapshot(other))


def test_a_state_dict_has_numbers_that_torch_loads_and_goes_on_with(backend: str) -> None:
    optimizer = make(make_params(SHAPES), backend)
    run(optimizer, 0, 7)
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    assert group["betas"] == (BETA1(7), BETA2(7))
    for name in ("eps", "max_grad_norm", "lr_scale"):
        assert group[name] == MOVING[name](7)
        assert group[f"{name}_schedule"].items() >= {**MOVING[name].to_dict(), "step": 7, "edits": {}}.items()
    params = copies(optimizer.param_groups[0]["params"])
    theirs = torch.optim.AdamW(params, lr=1.0)
    theirs.load_state_dict(saved)
    assert theirs.param_groups[0]["betas"] == (BETA1(7), BETA2(7))
    set_grads(params, make_grads(params))
    theirs.step()
    # And back: what torch has rounded, or gone on from, is not taken for the products of these updates.
    back = make(copies(params), backend)
    back.load_state_dict(theirs.state_dict())
    run(back, 8, 9)
    assert products(back) == pytest.approx([BETA1(8) ** 9, BETA2(8) ** 9, 9.0], rel=1e-14)


def test_a_load_takes_the_saved_products_in_place_of_its_own(backend: str) -> None:
    first, second = (make(make_params(SHAPES), backend) for _ in range(2))
    run(first, 0, 4)
    plain = make(make_params(SHAPES), backend, betas=(0.5, 0.6))
    run(plain, 0, 4)
    run(second, 0, 9)
    second.load_state_dict(first.state_dict())
    assert products(second) == products(first)
    second.load_state_dict(plain.state_dict())  # of as many updates, and without products
    run(second, 4, 5)
    assert products(second) == pytest.approx([BETA1(4) ** 5, BETA2(4) ** 5, 5.0], rel=1e-14)


def test_a_load_keeps_schedules_and_fills_tensors(backend: str) -> None:
    optimizer = make(make_params(SHAPES), backend)
    run(optimizer, 0, 5)
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {name: torch.tensor(0.5) for name in ("eps", "max_grad_norm", "beta1")}
    own = make(
        copies(optimizer.param_groups[0]["params"]),
        backend,
        eps=tensors["eps"],
        max_grad_norm=tensors["max_grad_norm"],
        betas=(tensors["beta1"], Linear(start_lr=0.9, end_lr=0.99, total_steps=12)),
        lr_scale=1.0,
    )
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        own.load_state_dict(saved)
    words = "\n".join(str(each.message) for each in given)
    for name in ("betas[0]", "eps", "max_grad_norm", "lr_scale"):
        assert f"the checkpoint's {name} was driven by a schedule, Linear" in words
    assert re.search(r"beta2_schedule.*0\.999", words)
    group = own.param_groups[0]
    assert group["betas"][0] is tensors["beta1"]
    assert group["betas"][1] == Linear(start_lr=0.9, end_lr=0.99, total_steps=12)
    assert [float(tensor) for tensor in tensors.values()] == pytest.approx(
        [MOVING["eps"](5), MOVING["max_grad_norm"](5), BETA1(5)]
    )
    assert group["lr_scale"] == MOVING["lr_scale"](5)
    assert group.keys() == make(make_params(SHAPES), backend).param_groups[0].keys()


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.float64), 1.0])
def test_products_that_are_none_are_refused(value: Any, backend: str) -> None:
    optimizer = make(make_params(SHAPES), backend)
    run(optimizer, 0, 2)
    saved = optimizer.state_dict()
    saved["state"] = {key: {**state, "beta_products": value} for key, state in saved["state"].items()}
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="beta_products must be 3 numbers"):
        optimizer.load_state_dict(saved)
    assert same_bits(before, snapshot(optimizer))
    param = optimizer.param_groups[0]["params"][0]
    optimizer.state[param]["beta_products"] = value
    with pytest.raises(ValueError, match=r"'beta_products' must be 3 numbers of torch\.float64.*delete it"):
        run(optimizer, 2, 3)
    del optimizer.state[param]["beta_products"]
    run(optimizer, 2, 3)
