"""Parameters without memory: on the meta device, before the model has any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import (
    Float64AdamW,
    assert_same_parameter,
    assert_same_run,
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

OPTIONS: dict[str, Any] = {"lr": WSD(2, 20, 5, 1e-2), "max_grad_norm": 1.0}


def meta_module() -> torch.nn.Module:
    with torch.device("meta"):
        return torch.nn.Linear(3, 2)


def test_an_optimizer_of_a_model_on_meta_trains_once_it_has_memory(backend: str, swaps: bool) -> None:
    module = meta_module()
    early = FusedAdamW(module.parameters(), backend=backend, **OPTIONS)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is on the meta device"):
        early.step()
    before = list(module.parameters())
    module.to_empty(device=torch.empty(()).device)
    assert [new is old for new, old in zip(module.parameters(), before, strict=True)] == [swaps] * 2
    module.reset_parameters()
    if not swaps:  # to_empty() has made other parameters. torch then trains nothing, without a word
        module(torch.ones(4, 3)).sum().backward()
        with pytest.raises(RuntimeError, match=r"make the optimizer after it"):
            early.step()
        early = FusedAdamW(module.parameters(), backend=backend, **OPTIONS)
    reference = Float64AdamW(list(module.parameters()), **OPTIONS)
    step_both(early, reference, 12)
    assert_same_run(early, reference)


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


def test_a_load_before_there_is_memory_is_refused(backend: str) -> None:
    saved, _ = run_beside_torch(list(torch.nn.Linear(3, 2).parameters()), backend)
    optimizer = FusedAdamW(meta_module().parameters(), backend=backend)
    with pytest.raises(ValueError, match=r"state\[0\] .* meta device: give the model memory"):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("swaps", [True], indirect=True)
def test_parameters_that_went_to_meta_and_came_back(backend: str, swaps: bool) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer, reference = run_beside_torch(list(module.parameters()), backend)
    values = [param.detach().clone() for param in module.parameters()]
    optimizer.zero_grad()
    module.to("meta")
    module(torch.ones(4, 3, device="meta")).sum().backward()
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step()
    module.to_empty(device=values[0].device)
    optimizer.zero_grad()
    with torch.no_grad():
        for param, value in zip(module.parameters(), values, strict=True):
            param.copy_(value)
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)
