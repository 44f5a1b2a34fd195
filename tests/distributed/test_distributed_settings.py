"""Over two processes: betas, eps, the limit of the norm and lr_scale that move, of parameters that are spread."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from distributed_cases import batch, loss_of, make_fsdp, my_rows, same_on_all_ranks, train, whole
from references import BACKENDS, PARAMS, assert_close, same_bits
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from worlds import in_processes

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Linear

MOVING: dict[str, Any] = {
    "lr": WSD(warmup_steps=5, stable_steps=10, decay_steps=15, peak_lr=2e-2, min_lr=1e-4),
    "betas": (Linear(start_lr=0.95, end_lr=0.8, total_steps=12), Linear(start_lr=0.9, end_lr=0.999, total_steps=12)),
    "eps": Linear(start_lr=1e-2, end_lr=1e-6, total_steps=15),
    "max_grad_norm": Linear(start_lr=0.3, end_lr=2.0, total_steps=15),
    "lr_scale": Linear(start_lr=0.2, end_lr=1.0, total_steps=9),
}


def make(params: list[Any], **options: Any) -> FusedAdamW:
    return FusedAdamW([{"params": params, **MOVING}], **options)


@pytest.mark.parametrize("backend", BACKENDS)
@in_processes(2)
def test_two_processes_do_what_one_does(backend: str) -> None:
    model = make_fsdp()
    params = list(model.parameters())
    alone = [torch.nn.Parameter(param.detach().full_tensor().clone()) for param in params]
    spread, single = make(params, backend=backend, skip_nonfinite=True), make(alone, backend="reference")
    for step in range(16):
        x, y = map(my_rows, batch(step))
        spread.zero_grad()
        loss_of(model, x * (float("nan") if step == 6 else 1.0), y).backward()
        for param, own in zip(params, alone, strict=True):
            own.grad = param.grad.full_tensor()
        spread.step()
        if step != 6:
            single.step()
    for param, own in zip(params, alone, strict=True):
        assert_close(whole(param), own, PARAMS[own.dtype])
        products = spread.state[param]["beta_products"]
        assert torch.equal(products, single.state[own]["beta_products"])
        assert products[2] == 15.0
        assert same_on_all_ranks(products, spread.state[param]["step"], spread.grad_norm)


WAYS: dict[str, dict[str, bool]] = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "from rank 0, on the CPU": {"full_state_dict": True, "broadcast_from_rank0": True, "cpu_offload": True},
}


@pytest.mark.parametrize("way", WAYS)
@in_processes(2)
def test_a_run_goes_on_bit_for_bit(way: str) -> None:
    options = StateDictOptions(**WAYS[way])
    model, resumed = make_fsdp(), make_fsdp()
    optimizer, other = make(list(model.parameters())), make(list(resumed.parameters()))
    train(model, optimizer, 0, 8)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed.load_state_dict(get_model_state_dict(model))
    if options.broadcast_from_rank0 and torch.distributed.get_rank() > 0:
        saved = {}
    set_optimizer_state_dict(resumed, other, saved, options=options)
    ends = []
    for each, its in ((model, optimizer), (resumed, other)):
        train(each, its, 8, 16)
        states = [its.state[param] for param in each.parameters()]
        ends.append([*map(whole, each.parameters()), *(state["beta_products"] for state in states)])
    assert same_bits(*ends)
    assert ends[0][-1][2] == 16.0
