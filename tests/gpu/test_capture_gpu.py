"""Train steps in real CUDA graphs: what only a GPU can show."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_worlds import LOOPS, World, plain_step, run, train
from references import same_bits
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nexus.backends import cuda, triton
from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Clock, CosineRestarts
from nexus.training import capture_train_step, find_lr

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = "cuda:0"


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = {"cuda": cuda, "triton": triton}[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    return request.param


class GpuWorld(World):
    """On the GPU, whose generator starts anew."""

    def __init__(self, backend: str, captured: bool, **options: Any) -> None:
        torch.cuda.manual_seed_all(0)
        super().__init__(backend, captured, device="cuda", **options)


@pytest.mark.parametrize("name", LOOPS)
def test_captured_steps_equal_plain_ones(name: str, backend: str) -> None:
    expected, found = (run(name, GpuWorld(backend, captured)) for captured in (False, True))
    assert same_bits(found, expected)


def captured_loop(backend: str, lr: Any, **options: Any) -> tuple[Any, FusedAdamW, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)).to(DEVICE)
    optimizer = FusedAdamW(model.parameters(), lr=lr, backend=backend, **options)

    def train_step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return capture_train_step(train_step, optimizer), optimizer, torch.randn(8, 16, device=DEVICE)


@pytest.mark.parametrize(
    "schedule",
    [
        WSD(warmup_steps=1000, stable_steps=5000, decay_steps=3000, peak_lr=1e-3, min_lr=1e-5, decay_type="cosine"),
        CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=500, cycle_mult=1.5, warmup_steps=100),
    ],
)
def test_ten_thousand_replays_have_the_rates_of_the_oracle(backend: str, schedule: Any) -> None:
    step, optimizer, x = captured_loop(backend, schedule)
    history = optimizer.history(capacity=10_000)
    for _ in range(10_000):
        step(x)
    rows = history.read()
    assert rows.step.tolist() == list(range(10_000))
    expected = torch.tensor(schedule.values(0, 10_000), dtype=torch.float64)
    assert torch.equal(rows.lr[:, 0].float(), expected.float())


def test_a_clock_in_a_graph_counts_what_is_on_the_device(
    backend: str, sync_debug_mode: Callable[[str], None]
) -> None:
    ends = []
    for captures in (False, True):
        torch.manual_seed(0)
        clock, schedule = Clock(), WSD(warmup_steps=300, stable_steps=500, decay_steps=400, peak_lr=1e-2)
        weight = torch.nn.Parameter(torch.ones(1000, device=DEVICE))
        optimizer = FusedAdamW([weight], lr=schedule.at(clock), skip_nonfinite=True, backend=backend)

        def train_step(
            x: Tensor, weight: Tensor = weight, optimizer: FusedAdamW = optimizer, clock: Clock = clock
        ) -> Tensor:
            optimizer.zero_grad()
            loss = (weight * x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.advance(clock, (x > 0).sum() // 10)
            return loss

        step = capture_train_step(train_step, optimizer) if captures else train_step
        inputs = torch.randn(20, 1000, device=DEVICE)
        inputs[12, 5] = torch.inf
        for index in range(20):
            x = inputs[index]
            sync_debug_mode("error" if index > 5 else "default")
            step(x)
        sync_debug_mode("default")
        found = find_lr(step, optimizer, inputs, steps=20)
        assert len(found.losses) >= 5
        step(inputs[0])
        ends.append((weight.detach().clone(), torch.tensor(clock.count), optimizer.param_groups[0]["lr"].clone()))
    assert same_bits(*ends)


@pytest.mark.parametrize("source", ["cpu", "pinned", "device"])
def test_a_replay_waits_for_nothing_and_copies_nothing_but_inputs(
    source: str, backend: str, sync_debug_mode: Callable[[str], None]
) -> None:
    step, _, x = captured_loop(
        backend,
        WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-2),
        max_grad_norm=1.0,
        skip_nonfinite=True,
    )
    given = {"cpu": x.cpu(), "pinned": x.cpu().pin_memory(), "device": x}[source]
    for _ in range(6):
        step(given)
    torch.cuda.synchronize()
    sync_debug_mode("error")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(10):
            step(given)
        sync_debug_mode("default")
    names = [event.name for event in profile.events()]
    assert sum("HtoD" in name for name in names) == (0 if source == "device" else 10)
    assert not any("DtoH" in name for name in names)
    assert sum(name == "cudaGraphLaunch" for name in names) == 10
    # The profiler itself waits for the device once or twice at its end.
    assert sum("Synchronize" in name for name in names) <= 2


def test_a_number_of_the_host_is_refused(backend: str) -> None:
    model = torch.nn.Linear(3, 1, device=DEVICE)
    optimizer = FusedAdamW(model.parameters(), backend=backend)
    factors = torch.ones(3)
    steps: list[tuple[Callable[[Tensor], Tensor], str]] = [
        (lambda loss: loss * loss.item(), "makes the host wait"),
        (lambda loss: loss * torch.tensor([1.0], device=DEVICE), "from numbers of the host"),
        (lambda loss: loss * factors.to(DEVICE).sum(), "on cpu, and the graph is on cuda:0"),
        (lambda loss: loss.cpu(), "on cpu, and the graph is on cuda:0"),
    ]
    for change, match in steps:

        def train_step(x: Tensor, change: Callable[[Tensor], Tensor] = change) -> Tensor:
            optimizer.zero_grad()
            loss = change(model(x).sum())
            loss.backward()
            optimizer.step()
            return loss

        step = capture_train_step(train_step, optimizer)
        for _ in range(2):
            step(torch.ones(2, 3))
        with pytest.raises(RuntimeError, match=match):
            step(torch.ones(2, 3))
        assert step.graph_count == 0


@pytest.mark.parametrize("case", ["float32", "bfloat16", "masked", "dropout", "flash", "cudnn"])
def test_attention(case: str) -> None:
    """Outside of a capture, the seed and the offset of efficient attention are numbers on the host."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    kernel = backends.get(case, SDPBackend.EFFICIENT_ATTENTION)
    dtype = torch.float32 if case in ("float32", "dropout") else torch.bfloat16
    mask = torch.ones(32, 32, dtype=torch.bool, device=DEVICE).tril() if case == "masked" else None
    dropout = 0.1 if case == "dropout" else 0.0

    def run(captured: bool) -> list[Tensor]:
        torch.manual_seed(0)
        torch.cuda.manual_seed_all(0)
        project = torch.nn.Linear(64, 192, device=DEVICE, dtype=dtype)
        optimizer = FusedAdamW(
            project.parameters(), lr=WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-2)
        )

        def train_step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            q, k, v = (part.unflatten(-1, (2, 32)).transpose(1, 2) for part in project(x).chunk(3, -1))
            with sdpa_kernel(kernel):
                attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            loss = attended.float().square().mean()
            loss.backward()
            optimizer.step()
            return loss

        step = capture_train_step(train_step, optimizer) if captured else train_step
        x = torch.randn(4, 32, 64, device=DEVICE, dtype=dtype)
        losses = [step(x).detach().clone() for _ in range(8)]
        return [*losses, *(param.detach().clone() for param in project.parameters())]

    assert same_bits(run(False), run(True))


def test_after_a_capture_that_cuda_has_ended(backend: str) -> None:
    """A capture that fails trains nothing: random numbers, allocations and other captures go on as without it."""

    def run(disturbed: bool) -> tuple[list[Tensor], list[Tensor]]:
        world = GpuWorld(backend, captured=True)
        inner = plain_step(world)
        if disturbed:

            def train_step(x: Tensor, y: Tensor) -> Tensor:
                loss = inner(x, y)
                torch.cuda.synchronize()  # which the inspection does not see
                return loss

            step = world.step(train_step)
            losses = train(world, step, 3)
            with pytest.raises(RuntimeError):
                step(*world.batch(3))
            torch.cuda.empty_cache()
        else:
            losses = train(world, inner, 3)
        return losses + train(world, world.step(inner), 6, first=3), world.state()

    for undisturbed, disturbed in zip(run(False), run(True), strict=True):
        assert same_bits(undisturbed, disturbed)


@pytest.mark.filterwarnings("ignore")  # Inductor warns of float32 that is not TF32
def test_a_compiled_model(backend: str) -> None:
    """By Inductor, whose kernels torch does not see write."""

    def run(captured: bool) -> list[Tensor]:
        torch._dynamo.reset()
        world = GpuWorld(backend, captured)
        world.model = torch.compile(world.model)
        losses = train(world, world.step(plain_step(world)))
        world.model = world.model._orig_mod
        return [*losses, *world.state()]

    assert same_bits(run(False), run(True))


def test_graphs_give_their_memory_back(backend: str) -> None:
    world = GpuWorld(backend, captured=True)
    step = world.step(plain_step(world), max_graphs=2)
    reserved = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="inputs of more than max_graphs=2 kinds")
        for size in range(3, 23):
            for _ in range(4):
                step(*world.batch(0, size * 1000))
            reserved.append(torch.cuda.memory_reserved())
    assert max(reserved[10:]) <= 2 * max(reserved[2:10])
