"""What only a GPU can show of updates in the backward pass: launches, copies, streams and several devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from references import same_bits, snapshot
from torch import Tensor, nn

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine
from nexus.training import step_in_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(params=["cuda", "triton"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def train(
    name: str, devices: list[str], loss_of: Callable[[nn.ParameterList], Tensor], *, in_backward: bool
) -> list[Tensor]:
    """What ten steps of a parameter on each device leave, whose gradient is computed without a matrix product."""
    model = nn.ParameterList(nn.Parameter(torch.linspace(-1.0, 1.0, 40_000, device=device)) for device in devices)
    optimizer = FusedAdamW(
        model.parameters(),
        lr=WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=0.1),
        weight_decay=Cosine(peak_lr=0.1, total_steps=9),
        backend=name,
    )
    if in_backward:
        step_in_backward(model, optimizer)
    for _ in range(10):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return snapshot(optimizer)


def test_hooks_on_several_streams(name: str) -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]

    def loss_of(model: nn.ParameterList) -> Tensor:
        current, losses = torch.cuda.current_stream(), []
        for index, (param, stream) in enumerate(zip(model, streams, strict=True)):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000 * (1 + index))
                losses.append(torch.sin(param).square().sum())
        for stream in streams:
            current.wait_stream(stream)
        return torch.stack(losses).sum()

    plain, ours = (train(name, ["cuda"] * 3, loss_of, in_backward=each) for each in (False, True))
    assert same_bits(plain, ours)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_hooks_on_several_devices(name: str) -> None:
    def loss_of(model: nn.ParameterList) -> Tensor:
        return torch.stack([torch.sin(param).square().sum().to("cuda:0") for param in model]).sum()

    devices = ["cuda:0", "cuda:1", "cuda:0"]
    plain, ours = (train(name, devices, loss_of, in_backward=each) for each in (False, True))
    assert same_bits(plain, ours)


def test_an_update_is_one_launch_and_no_copy(sync_debug_mode: Callable[[str], None]) -> None:
    model = nn.ParameterList(nn.Parameter(torch.zeros(300, device="cuda")) for _ in range(5))
    optimizer = FusedAdamW(
        model.parameters(), lr=WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=0.1), backend="cuda"
    )
    step_in_backward(model, optimizer)
    kept = []

    def step() -> None:
        for param in model:
            param.grad = torch.ones_like(param)
            kept.append(param.grad)  # so that the next one is elsewhere
            for hook in param._post_accumulate_grad_hooks.values():
                hook(param)
        optimizer.step()

    step()
    torch.cuda.synchronize()
    sync_debug_mode("error")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        sync_debug_mode("default")  # the end of the profile waits
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("prepare" in name for name in names) == 2
    assert sum("update_tensors" in name for name in names) == len(model) + 1
    assert len(names) == 2 * len(model) + 3, names  # the others made the gradients
