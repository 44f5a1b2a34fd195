"""The prologue of a CUDA step: blocks of tensors that share the coefficients of their groups."""

from __future__ import annotations

import torch
from cuda_on_cpu import NAME, shim
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

SIZES = {"one group": [700], "groups of one": [1] * 300, "across blocks": [255, 0, 2, 0, 0, 300, 1, 90]}


def trained(backend: str, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Four steps over tensors of one element. Every fifth has no gradient in the first, every seventh never has."""
    params = [torch.nn.Parameter(torch.randn(1, dtype=dtype)) for _ in range(sum(sizes))]
    groups, rest = [], iter(params)
    for index, size in enumerate(sizes):
        own = [next(rest) for _ in range(size)]
        betas = (0.9, 0.99 + 0.009 * index / len(sizes))
        groups.append(
            {
                "params": own,
                "lr": WSD(warmup_steps=2, stable_steps=3, decay_steps=4, peak_lr=0.1 / (1 + index)),
                "betas": betas,
            }
        )
    optimizer = FusedAdamW(groups, max_grad_norm=1.0, backend=backend)
    for step in range(4):
        for index, param in enumerate(params):
            has_none = index % 7 == 3 or (index % 5 == 0 and step == 0) or (index < 2 and step == 2)
            param.grad = None if has_none else torch.randint(-8, 9, (1,)).to(dtype)  # the norm is exact
        optimizer.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    return [*params, *rates, *(moment for state in optimizer.state.values() for moment in state.values())]


def test_tensors_share_what_their_groups_have_in_common() -> None:
    for name, sizes in SIZES.items():
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(1)
            expected = trained("native", sizes, dtype)
            torch.manual_seed(1)
            for got, want in zip(trained(NAME, sizes, dtype), expected, strict=True):
                assert torch.equal(got, want), (name, dtype)


def test_a_block_for_256_tensors() -> None:
    gpu = shim()
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(513)]
    for param in params:
        param.grad = torch.ones(1)
    optimizer = FusedAdamW(params, backend=NAME)
    gpu.reset()
    optimizer.step()
    assert [launch.grid for launch in gpu.launches() if launch.kernel == "prepare"] == [3]


def test_a_rate_that_the_step_writes_for_another_group_is_one_rate_for_all_tensors() -> None:
    for place in (0, 1):  # of the schedule's group, before or after
        for backend in ("native", NAME):
            params = [torch.nn.Parameter(torch.ones(1)) for _ in range(601)]
            driven = {"params": params[:1], "lr": WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=0.1)}
            groups = [driven, {"params": params[1:]}] if place == 0 else [{"params": params[1:]}, driven]
            optimizer = FusedAdamW(groups, backend=backend)
            optimizer.param_groups[1 - place]["lr"] = optimizer.param_groups[place]["lr"]
            for _ in range(6):
                for param in params:
                    param.grad = torch.ones(1)
                optimizer.step()
            assert torch.equal(torch.stack(params), params[0].detach().expand(601, 1)), (place, backend)
