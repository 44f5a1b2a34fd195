"""Training loops for the tests of capture: each is run once as it is and once captured, and has to end the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cuda_on_cpu import NAME
from references import same_bits
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import WSD
from nexus.training import capture_train_step
from nexus.training.schedulers import WSDScheduler

SCHEDULE = WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-2)
STEPS = 14
NO_GRADIENT = torch.empty(0, dtype=torch.bool, device="cpu")


class World:
    """A model, an optimizer and data. `captured` says whether `self.step` captures.

    Args:
        backend: of the optimizer.
        options: for the optimizer.
    """

    def __init__(self, backend: str, captured: bool, device: str = "cpu", **options: Any) -> None:
        torch.manual_seed(0)
        self.device = device
        self.captured = captured
        with torch.device(device):
            self.model = torch.nn.Sequential(
                torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
            )
        options = {"lr": SCHEDULE, "max_grad_norm": 0.5, **options}
        self.optimizer: torch.optim.Optimizer = FusedAdamW(self.model.parameters(), backend=backend, **options)
        self.extra: list[Any] = []  # tensors, and functions that give one

    def step(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return capture_train_step(function, self.optimizer, **options) if self.captured else function

    def batch(self, index: int, size: int = 6) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(size, 4, generator=generator)
        return x, x.sum(1, keepdim=True)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.model(x.to(self.device)) - y.to(self.device)).square().mean()

    def state(self) -> list[Tensor]:
        """Copies of all that a step changes."""
        found = list(self.model.state_dict().values())
        for param in self.model.parameters():
            found += [value for value in self.optimizer.state.get(param, {}).values() if isinstance(value, Tensor)]
        found += [torch.as_tensor(group["lr"]) for group in self.optimizer.param_groups]
        found += [value() if callable(value) else torch.as_tensor(value) for value in self.extra]
        if isinstance(self.optimizer, FusedAdamW):
            found.append(self.optimizer.skipped_steps)
        if self.device != "cpu":
            found.append(torch.cuda.get_rng_state(self.device))
        found += [NO_GRADIENT if param.grad is None else param.grad for param in self.model.parameters()]
        return [tensor.detach().cpu().clone() for tensor in found] + [torch.get_rng_state()]


def plain_step(
    world: World, clears: str = "before", set_to_none: bool = True, then: Callable[[Tensor], Any] = lambda loss: None
) -> Callable[..., Any]:
    """A train step.

    Args:
        clears: when it clears gradients: `"before"`, `"after"` or `"never"`.
        set_to_none: how it clears them.
        then: is called with the loss at the end; what it returns is returned in the place of the loss.
    """

    def train_step(x: Tensor, y: Tensor) -> Any:
        if clears == "before":
            world.optimizer.zero_grad(set_to_none)
        loss = world.loss(x, y)
        loss.backward()
        world.optimizer.step()
        if clears == "after":
            world.optimizer.zero_grad(set_to_none)
        result = then(loss)
        return loss if result is None else result

    return train_step


def train(
    world: World,
    step: Callable[..., Tensor],
    steps: int = STEPS,
    first: int = 0,
    *,
    batch: Callable[[int], tuple[Tensor, ...]] | None = None,
    before: Callable[[int], object] = lambda index: None,
) -> list[Tensor]:
    """The losses of some steps; `before` is called with the index of each."""
    losses = []
    for index in range(first, first + steps):
        before(index)
        losses.append(step(*(batch or world.batch)(index)).detach().cpu().clone())
    return losses


def run(name: str, world: World) -> list[Tensor]:
    """What a loop returns, and all that it leaves."""
    return [*LOOPS[name](world), *world.state()]


def assert_same_ends(use: Callable[[World], object]) -> None:
    """Of a world where steps are plain, and of one where they are captured."""
    ends = []
    for captured in (False, True):
        world = World(NAME, captured)
        use(world)
        ends.append(world.state())
    assert same_bits(*ends)


def cleared(world: World, **how: Any) -> list[Tensor]:
    return train(world, world.step(plain_step(world, **how)))


Loop = Callable[[World], list[Tensor]]
LOOPS: dict[str, Loop] = {
    "cleared_at_the_start": cleared,
    "cleared_at_the_start_in_place": partial(cleared, set_to_none=False),
    "cleared_at_the_end": partial(cleared, clears="after"),
}


def loop(function: Loop) -> Loop:
    LOOPS[function.__name__] = function
    return function


def fill_gradients(world: World, value: float) -> None:
    for param in world.model.parameters():
        param.grad = torch.full_like(param, value)


@loop
def cleared_outside(world: World) -> list[Tensor]:
    def before(index: int) -> None:
        if index % 3 == 1:
            world.optimizer.zero_grad()
        elif index % 3 == 2:
            fill_gradients(world, 0.01 * index)

    return train(world, world.step(plain_step(world, clears="never")), before=before)


@loop
def never_cleared(world: World) -> list[Tensor]:
    fill_gradients(world, 0.5)  # left from before
    return cleared(world, clears="never")


@loop
def accumulated(world: World) -> list[Tensor]:
    def accumulate(x: Tensor, y: Tensor) -> Tensor:
        loss = world.loss(x, y)
        loss.backward()
        return loss

    update = plain_step(world, clears="after", set_to_none=False)
    steps = [world.step(step) for step in (accumulate, accumulate, update)]
    return [loss for index in range(STEPS) for loss in train(world, steps[index % 3], 1, index)]


@loop
def other_shapes_in_turns(world: World) -> list[Tensor]:
    found: list[Tensor] = []
    step = world.step(plain_step(world))
    for index in range(STEPS):
        found += train(world, step, 1, index, batch=partial(world.batch, size=5 + index % 3))
        found += [param.grad.cpu().clone() for param in world.model.parameters()]
    return found


@loop
def trees(world: World) -> list[Tensor]:
    def train_step(batch: dict[str, Any], *, weight: float) -> dict[str, Any]:
        world.optimizer.zero_grad()
        (x, y), scale = batch["pair"], batch["scale"]
        loss = world.loss(x * scale.to(x.device), y) * weight
        loss.backward()
        world.optimizer.step()
        return {"loss": loss, "parts": (loss * 2, [loss * 3])}

    losses, step = [], world.step(train_step)
    for index in range(STEPS):
        batch = {"pair": list(world.batch(index)), "scale": torch.tensor(1.0 + index)}
        result = step(batch, weight=1.0 if index % 4 else 0.5)
        losses += [tensor.detach().clone() for tensor in (result["loss"], result["parts"][0], result["parts"][1][0])]
    return losses


@loop
def autocast_inside(world: World) -> list[Tensor]:
    loss = world.loss

    @torch.autocast(world.device, torch.bfloat16)
    def twice(x: Tensor, y: Tensor) -> Tensor:
        return loss(x, y) + loss(x, y)  # the weights are cast once for both

    world.loss = twice
    return cleared(world)


@loop
def autocast_outside(world: World) -> list[Tensor]:
    step = world.step(plain_step(world))
    losses = []
    for index in range(STEPS):
        with torch.autocast(world.device, torch.bfloat16, enabled=index % 4 != 3):
            losses += train(world, step, 1, index)
    return losses


@loop
def scaled(world: World) -> list[Tensor]:
    scaler = torch.amp.GradScaler(world.device, init_scale=4.0, growth_interval=3)
    world.extra = [lambda: scaler._scale, lambda: scaler._growth_tracker]

    def train_step(x: Tensor, y: Tensor, spike: Tensor) -> Tensor:
        world.optimizer.zero_grad()
        loss = world.loss(x, y)
        scaler.scale(loss * spike.to(loss.device)).backward()
        scaler.step(world.optimizer)
        scaler.update()
        return loss

    def batch(index: int) -> tuple[Tensor, ...]:
        return *world.batch(index), torch.tensor(float("inf") if index == 5 else 1.0)

    return train(world, world.step(train_step), batch=batch)


@loop
def averaged_weights(world: World) -> list[Tensor]:
    averages = [param.detach().clone() for param in world.model.parameters()]
    calls = torch.zeros((), dtype=torch.int64, device=world.device)
    world.extra = [*averages, calls]

    @torch.no_grad()
    def average(loss: Tensor) -> None:
        torch._foreach_lerp_(averages, list(world.model.parameters()), 0.1)
        calls.add_(1)
        world.model[0].weight.clamp_(-0.4, 0.4)  # after the kernels have written it

    return cleared(world, then=average)


@loop
def checkpointed(world: World) -> list[Tensor]:
    """Saved and loaded in place between replays."""
    step = world.step(plain_step(world))
    losses = train(world, step, 5)
    parts = (world.model, world.optimizer)
    saved = copy.deepcopy([part.state_dict() for part in parts])
    losses += train(world, step, 1, first=5)
    world.optimizer.param_groups[0].update(weight_decay=0.5, max_grad_norm=0.1)
    losses += train(world, step, 2, first=6)
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    return losses + train(world, step, 6, first=5)


@loop
def edited(world: World) -> list[Tensor]:
    """Hyperparameters and schedule are changed right before the capture and between replays."""
    group = world.optimizer.param_groups[0]
    changes: dict[int, Callable[[], object]] = {
        3: partial(group.update, weight_decay=0.2),
        4: partial(group.update, weight_decay=0.5),
        6: partial(group.update, max_grad_norm=0.05),
        8: partial(group.update, betas=(0.5, 0.9), lr_scale=0.5),
        10: partial(world.optimizer.extend_stable, 2),
        11: world.optimizer.begin_decay,
    }
    return train(world, world.step(plain_step(world)), before=lambda index: changes.get(index, object)())


def scheduled(world: World, inside: bool) -> list[Tensor]:
    world.optimizer = FusedAdamW(world.model.parameters(), backend=world.optimizer.backend, max_grad_norm=0.5)
    scheduler = WSDScheduler(world.optimizer, warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-2)
    world.extra = [scheduler._device_rates.counter]
    losses, step = [], world.step(plain_step(world, then=lambda loss: scheduler.step() if inside else None))
    for index in range(STEPS):
        if index == 6:
            scheduler.extend_stable(2)
        if index == 9:
            world.optimizer.param_groups[0]["lr_scale"] = 0.5
        losses += train(world, step, 1, index)
        if not inside:
            scheduler.step()
        losses.append(torch.tensor([*scheduler.get_last_lr(), scheduler.last_epoch], dtype=torch.float64))
        assert torch.equal(losses[-1][:1].to(world.device), world.optimizer.param_groups[0]["lr"].reshape(1))
        assert scheduler._step_count == index + 2
    return losses


LOOPS["scheduler_inside"] = partial(scheduled, inside=True)
LOOPS["scheduler_outside"] = partial(scheduled, inside=False)


@loop
def compiled(world: World) -> list[Tensor]:
    torch._dynamo.reset()
    world.model = torch.compile(world.model, backend="aot_eager")
    losses = train(world, world.step(plain_step(world)), 6)
    world.model = world.model._orig_mod
    return losses


@loop
def torchs_own(world: World) -> list[Tensor]:
    """Its state is made in the first step."""
    lr = torch.tensor(1e-2, device=world.device)
    world.optimizer = torch.optim.AdamW(world.model.parameters(), lr=lr, fused=True, capturable=True)
    world.optimizer._warned_capturable_if_run_uncaptured = True  # the plain loop means it
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(world.optimizer, 10)
    losses, step = [], world.step(plain_step(world))
    for index in range(STEPS):
        losses += train(world, step, 1, index)
        scheduler.step()
    return losses


@loop
def skipped(world: World) -> list[Tensor]:
    world.optimizer = FusedAdamW(
        world.model.parameters(), lr=SCHEDULE, backend=world.optimizer.backend, skip_nonfinite=True
    )
    history = world.optimizer.history(capacity=100)

    def batch(index: int) -> tuple[Tensor, ...]:
        x, y = world.batch(index)
        return x, y * (float("nan") if index in (0, 4) else 1.0)

    train(world, world.step(plain_step(world)), batch=batch)
    rows = history.read()
    return [rows.step, rows.lr, rows.skipped, rows.grad_norm.nan_to_num(-1.0)]
