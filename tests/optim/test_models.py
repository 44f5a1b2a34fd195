"""What is done to a model around its optimizer: converted, under grad modes, made on the meta device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import (
    Float64AdamW,
    assert_same_parameter,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

SCHEDULE = WSD(warmup_steps=2, stable_steps=20, decay_steps=5, peak_lr=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_is_converted_between_two_steps(backend: str, swaps: bool, dtype: torch.dtype) -> None:
    module = torch.nn.Linear(3, 2)
    params = list(module.parameters())
    optimizer, reference = run_beside_torch(params, backend)
    module.to(dtype)
    assert all(new is old for new, old in zip(module.parameters(), params, strict=True))
    optimizer.zero_grad()
    # The update goes on from float32 moments and parameters, whatever it is made in from now on.
    reference.dtypes = [dtype] * 2
    with torch.no_grad():
        for index, param in enumerate(params):
            reference.params[index].copy_(param)
            for name in ("exp_avg", "exp_avg_sq"):
                reference.state(index)[name].copy_(optimizer.state[param][name])
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


# Grad modes.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("lr", [0.01, SCHEDULE], ids=["float", "schedule"])
@pytest.mark.parametrize("made", ["as usual", "sliced", "in inference mode"])
def test_steps_under_a_grad_mode_and_without(backend: str, mode: Callable[[], Any], lr: Any, made: str) -> None:
    with torch.inference_mode(made == "in inference mode"):  # torch's AdamW cannot update these outside of it
        params = make_params([(6, 4), (5,)])
    if made == "sliced":  # is updated through a copy
        params[0] = torch.nn.Parameter(torch.randn(6, 8)[:, ::2])
    optimizer, reference = run_beside_torch(params, backend, 0, lr=lr, amsgrad=True, max_grad_norm=1.0)
    for count in range(6):
        grads = make_grads(params)
        set_grads(params, grads)
        reference.step(grads)
        with mode() if count % 2 == 0 else contextlib.nullcontext():
            optimizer.step()
        if count == 3:
            with mode():
                saved = optimizer.state_dict()
                optimizer.state.clear()
                optimizer.load_state_dict(saved)
        if count == 4:
            optimizer.load_state_dict(optimizer.state_dict())
    assert_same_run(optimizer, reference)
    if made != "in inference mode":
        params[1].square().sum().backward()  # parameters are still autograd's


def test_a_schedule_that_was_put_there_in_inference_mode(backend: str) -> None:
    optimizer, _ = run_beside_torch(make_params([(5,), (3, 4)]), backend, lr=SCHEDULE)
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.inference_mode():
        optimizer.param_groups[0]["lr"] = WSD(warmup_steps=2, stable_steps=None, decay_steps=5, peak_lr=1e-2)
        optimizer.step()
    optimizer.begin_decay()
    with pytest.warns(UserWarning, match="stable_steps"):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict()["state"], saved["state"], rtol=0, atol=0)


# Parameters without memory, on the meta device.


OPTIONS: dict[str, Any] = {"lr": SCHEDULE, "max_grad_norm": 1.0}


def meta_module() -> torch.nn.Linear:
    with torch.device("meta"):
        return torch.nn.Linear(3, 2)


def test_an_optimizer_of_a_model_on_meta_trains_once_it_has_memory(backend: str, swaps: bool) -> None:
    module = meta_module()
    optimizer = FusedAdamW(module.parameters(), backend=backend, **OPTIONS)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is on the meta device"):
        optimizer.step()
    saved, _ = run_beside_torch(list(torch.nn.Linear(3, 2).parameters()), backend)
    with pytest.raises(ValueError, match=r"state\[0\] .* meta device: give the model memory"):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state
    before = module.weight
    module.to_empty(device=torch.empty(()).device).reset_parameters()
    assert (module.weight is before) == swaps
    if not swaps:  # to_empty() has made other parameters. torch then trains nothing, without a word
        module(torch.ones(4, 3)).sum().backward()
        with pytest.raises(RuntimeError, match=r"make the optimizer after it"):
            optimizer.step()
        optimizer = FusedAdamW(module.parameters(), backend=backend, **OPTIONS)
    reference = Float64AdamW(list(module.parameters()), **OPTIONS)
    step_both(optimizer, reference, 12)
    assert_same_run(optimizer, reference)


def test_what_stays_on_meta_is_left_alone_as_by_torch(backend: str) -> None:
    own = make_params([(3,), (4, 2)])
    elsewhere = torch.nn.Parameter(torch.zeros(5, device="meta"))  # another stage's of a pipeline
    optimizer = FusedAdamW([elsewhere, *own], backend=backend, **OPTIONS)
    reference = Float64AdamW(own, **OPTIONS)
    compiled = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for step in [optimizer.step] * 3 + [compiled] * 2:
        grads = make_grads(own)
        set_grads(own, grads)
        reference.step(grads)
        step()
    for index, param in enumerate(own):
        assert_same_parameter(optimizer, param, reference, index)
    assert elsewhere not in optimizer.state
    elsewhere.grad = torch.zeros_like(elsewhere)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is on the meta device"):
        optimizer.step()
    assert same_bits(before[1:], snapshot(optimizer)[1:])


@pytest.mark.parametrize("swaps", [True], indirect=True)
def test_parameters_that_went_to_meta_and_came_back(backend: str, swaps: bool) -> None:
    module = torch.nn.Linear(3, 2)
    params = list(module.parameters())
    optimizer, reference = run_beside_torch(params, backend)
    before = copies(params)
    optimizer.zero_grad()
    module.to("meta")
    module(torch.ones(4, 3, device="meta")).sum().backward()
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step()
    module.to_empty(device=before[0].device)
    optimizer.zero_grad()
    module.load_state_dict(dict(zip(("weight", "bias"), before, strict=True)))
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)
