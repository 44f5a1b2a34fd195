"""DDP, ZeroRedundancyOptimizer and the stages of a pipeline beside one process in float64 torch."""

from __future__ import annotations

import functools
import io
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import OPTIONS, SCHEDULE, follow_one_process, make_net, same_on_all_ranks, train
from references import Float64AdamW, make_grads, make_params, same_bits, set_grads
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from worlds import in_processes

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of


def make_ddp(device: str = "cpu", **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(make_net(torch.float64, device), **options)


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("size", [2, 3])
@in_processes(backend="auto", device="cpu")
def test_ddp_trains_as_one_process(bucket_view: bool, backend: str, device: str) -> None:
    model = make_ddp(device, gradient_as_bucket_view=bucket_view)
    optimizer = FusedAdamW(model.parameters(), backend=backend, **OPTIONS)
    follow_one_process(model, optimizer, make_net(torch.float64, device), steps=30)
    assert not engine_of(optimizer).plan.norm_parts  # gradients are whole everywhere: no sum over processes
    assert same_on_all_ranks(optimizer.grad_norm, *model.parameters())


def make_zero(model: torch.nn.Module, *, bucket_view: bool = False, **options: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # the import warns of what torch itself deprecates

    return ZeroRedundancyOptimizer(
        model.parameters(),
        functools.partial(FusedAdamW, norm_group=dist.group.WORLD),
        parameters_as_bucket_view=bucket_view,
        **{**OPTIONS, **options},
    )


@pytest.mark.parametrize("bucket_view", [False, True])
@in_processes(2)
def test_zero_trains_as_one_process(bucket_view: bool) -> None:
    model = make_ddp()
    optimizer = make_zero(model, bucket_view=bucket_view)
    follow_one_process(model, optimizer, make_net(torch.float64), steps=20)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(SCHEDULE(19), rel=1e-15)
    assert same_on_all_ranks(optimizer.optim.grad_norm, *model.parameters())
    held = sum(param.numel() for group in optimizer.optim.param_groups for param in group["params"])
    assert 0 < held < sum(param.numel() for param in model.parameters())


def read_back(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def gathered_by_zero(optimizer: Any) -> dict[str, Any]:
    """Its own state dict, which one process has, for all of them."""
    optimizer.consolidate_state_dict(to=0)
    everything = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(everything)
    return everything[0]


@pytest.mark.parametrize("scheduled", [False, True])
@in_processes(2)
def test_a_run_with_zero_resumes(scheduled: bool) -> None:
    lr = SCHEDULE if scheduled else 0.01
    whole, resumed = make_ddp(), make_ddp()
    first, second = make_zero(whole, lr=lr), make_zero(resumed, lr=lr)
    train(whole, first, 0, 10)
    resumed.load_state_dict(whole.state_dict())
    if scheduled:  # each process its own part, which has the schedule's counter
        second.optim.load_state_dict(read_back(first.optim.state_dict()))
    else:
        second.load_state_dict(read_back(gathered_by_zero(first)))
    train(whole, first, 10, 20)
    train(resumed, second, 10, 20)
    assert same_bits(list(whole.parameters()), list(resumed.parameters()))
    for optimizer in (first, second):
        assert {int(state["step"]) for state in optimizer.optim.state.values()} == {20}
    assert float(second.param_groups[0]["lr"]) == float(first.param_groups[0]["lr"])


@in_processes(2)
def test_zeros_own_load_which_loses_the_schedules_counter_is_an_error() -> None:
    model = make_ddp()
    first, second = make_zero(model), make_zero(model)
    train(model, first, 0, 1)
    second.load_state_dict(gathered_by_zero(first))
    with pytest.raises(RuntimeError, match=r"was set to .* while WSD"):
        second.step()


@pytest.mark.parametrize("scales", [False, True])
@in_processes(2)
def test_processes_with_parameters_of_their_own_share_norm_and_decision(scales: bool) -> None:
    """As the stages of a pipeline have: each process has other parameters of the same model."""
    start: list[Tensor] = [param.detach() for param in make_params([(5, 3), (7,), (2, 2), (4,)])]
    mine = slice(0, 3) if dist.get_rank() == 0 else slice(3, 4)
    params = [torch.nn.Parameter(tensor.clone()) for tensor in start[mine]]
    optimizer = FusedAdamW(params, skip_nonfinite=not scales, norm_group=dist.group.WORLD, **OPTIONS)
    reference = Float64AdamW(start, **OPTIONS)
    for step in range(10):
        grads = make_grads(start)
        bad = step == 4
        if not bad:
            reference.step(grads)
        if scales:
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(bad and dist.get_rank() == 1))
        elif bad:
            grads[3][0] = math.nan  # in what rank 1 has alone
        set_grads(params, grads[mine])
        optimizer.step()
    for param, expected in zip(params, reference.params[mine], strict=True):
        torch.testing.assert_close(param.double(), expected, rtol=1e-6, atol=1e-6)
    assert same_on_all_ranks(optimizer.grad_norm, optimizer.skipped_steps)
    assert int(optimizer.skipped_steps) == 1
