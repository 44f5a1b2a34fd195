"""The learning rate range test: a short sweep through the rates, after which the run is where it was."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nexus.arguments import MAX_STEP, check_count, check_fraction, check_number, shown
from nexus.optim import FusedAdamW
from nexus.optim.engine import attributes_of, devices_of, engine_of
from nexus.schedules import Clock, Exponential, ReduceOnPlateau
from nexus.schedules.clock import unclocked
from nexus.training.rewind import rewinding

B = TypeVar("B")

READS = 10  # of the losses, each of which may end the sweep
FEWEST = 5  # losses, the mean of which says something
DIVERGED = 4.0  # times the least loss so far, as in fastai


@dataclass(frozen=True)
class RangeTest:
    """What `find_lr` has measured.

    Attributes:
        rates: the learning rate of each step of the sweep.
        losses: the loss that each step returned; the mean over the processes where there are several.
        smoothed: exponential means of the losses on both sides, where a loss above those of the first tenth counts
            as the highest of these: so a divergence, which may be of any size, does not reach back.
        suggestion: the rate at which the smoothed loss falls most steeply, over the logarithm of the rate, before its
            least value; None where it never falls.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw losses over rates, and the suggestion, to a PNG, SVG or PDF: see `nexus.plot.draw_range_test`."""
        from nexus.plot import draw_range_test

        draw_range_test(self, path)


def find_lr(
    train_step: Callable[[B], Tensor],
    optimizer: FusedAdamW,
    batches: Iterable[B],
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    model: nn.Module | None = None,
    smoothing: float = 0.1,
) -> RangeTest:
    r"""Train for a few steps at rates that rise from `low` to `high`, and put everything back.

    Step i of N uses the rate :math:`low \cdot (high / low)^{i / (N - 1)}` in every group (times its `lr_scale`),
    evaluated on the device. The losses stay there, and are read after each tenth of the steps, at least five at once:
    the sweep ends early where their mean is no finite number, or above four times the least so far.

    Put back, bit for bit, are: parameters and gradients; buffers of `model`; the optimizer's state, counters,
    settings, schedules with their edits, clocks and history; random numbers of torch, Python and NumPy. What else a
    train step changes, such as a `GradScaler` or a scheduler, is yours to put back; it must not set the rate.

    Args:
        train_step: makes one whole training step on a batch, and returns the loss: a 0-dim tensor. What
            `capture_train_step` returns will do.
        optimizer: what `train_step` steps.
        batches: at least `steps` of them. An iterator is used up so far.
        low: the first rate, above 0.
        high: the last rate, above `low`.
        steps: N, at least 3.
        model: whose buffers (of batch normalization, say) and further parameters are put back, too.
        smoothing: by which share the weight of a loss in the smoothed one falls from one step to the next, above 0
            and at most 1; 1 smooths nothing.

    Returns:
        Rates, losses and a suggestion; `plot(path)` draws them.

    Raises:
        TypeError, ValueError: an argument that is not allowed, too few batches, a loss that is no 0-dim tensor, or a
            train step that does not step the optimizer: named. Everything is put back.

    Source: Smith 2017, arXiv:1506.01186, section 3.3. The suggestion is that of fastai's `steep`; a schedule's
    highest rate is often chosen near to it.

    >>> import torch
    >>> from nexus.optim import FusedAdamW
    >>> from nexus.training import find_lr
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = FusedAdamW(model.parameters(), lr=1e-3)
    >>> def train_step(x):
    ...     optimizer.zero_grad()
    ...     loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     return loss
    >>> found = find_lr(train_step, optimizer, [torch.randn(64, 4) for _ in range(50)], low=1e-4, steps=50)
    >>> 1e-2 < found.suggestion < 1
    True
    >>> len(optimizer.state), optimizer.param_groups[0]["lr"]
    (0, 0.001)
    """
    if not callable(train_step):
        raise TypeError(f"train_step must be callable, got {shown(train_step)}")
    if not isinstance(optimizer, FusedAdamW):
        raise TypeError(f"optimizer must be a nexus.optim.FusedAdamW, got {shown(optimizer)}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {shown(model)}")
    low, high = check_number("low", low, positive=True), check_number("high", high, positive=True)
    if low >= high or math.isinf(high / low):
        raise ValueError(f"low must be below high={high!r}, and not by more than a float holds, got {low!r}")
    steps = check_count("steps", steps, low=3)
    smoothing = check_fraction("smoothing", smoothing, positive=True)
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be iterable, got {shown(batches)}")
    with contextlib.suppress(TypeError):  # a DataLoader has a length, and over an IterableDataset has none
        if isinstance(batches, Sized) and len(batches) < steps:
            raise ValueError(_too_few(len(batches), steps))
    sweep = Exponential(peak_lr=low, gamma=high / low, every=steps - 1)
    with rewinding(optimizer, model):
        losses = _swept(train_step, optimizer, batches, sweep, steps)
    rates = tuple(sweep.values(0, len(losses)))
    smoothed = tuple(_smoothed(losses, smoothing))
    return RangeTest(rates, tuple(losses), smoothed, _suggested(rates, smoothed))


def _swept(
    train_step: Callable[[B], Tensor],
    optimizer: FusedAdamW,
    batches: Iterable[B],
    sweep: Exponential,
    steps: int,
) -> list[float]:
    """The losses of the sweep, as far as it came."""
    engine, clock = engine_of(optimizer), Clock()
    for group in optimizer.param_groups:
        hears = isinstance(unclocked(group["lr_schedule"]), ReduceOnPlateau)  # what the train step may report
        group["lr"] = (ReduceOnPlateau(sweep, patience=MAX_STEP) if hears else sweep).at(clock)
    engine.settle(attributes_of(optimizer))
    optimizer.sync_hyperparameters()
    devices = devices_of(attributes_of(optimizer))
    started = _steps_of(optimizer)
    found: list[float] = []
    means: list[float] = []
    unread: list[Tensor] = []
    iterator = iter(batches)
    for step in range(steps):
        try:
            batch = next(iterator)
        except StopIteration:
            raise ValueError(_too_few(step, steps)) from None
        loss = train_step(batch)
        _check_loss(loss)
        unread.append(loss.detach().double().clone())  # a graph's output is overwritten by the next replay
        for device in devices:
            engine.clocks.on(clock, engine.state_on(device)).count.add_(1)  # also where the step was skipped
        if len(unread) == _tenth(steps) or step == steps - 1:
            losses = _read(unread)
            unread.clear()
            if _steps_of(optimizer) == started:
                raise ValueError("train_step must step the optimizer that find_lr was given, and has not")
            found += losses
            means.append(sum(losses) / len(losses))
            if not math.isfinite(means[-1]) or (min(means) > 0.0 and means[-1] > DIVERGED * min(means)):
                break
    return found


def _steps_of(optimizer: FusedAdamW) -> int:
    """How many there were, skipped ones included. Reads the device."""
    state = engine_of(optimizer).state_on(devices_of(attributes_of(optimizer))[0])
    return int(state.completed) + int(state.skipped)


def _tenth(steps: int) -> int:
    return max(FEWEST, steps // READS)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.dtype.is_floating_point:
        given = f"the shape {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else shown(loss)
        raise TypeError(f"train_step must return the loss, a 0-dim floating-point tensor, got {given}")


def _too_few(count: int, steps: int) -> str:
    return (
        f"batches must be at least steps={steps}, got {count}: give fewer steps, or repeat them, as "
        "itertools.cycle(batches) does"
    )


def _read(losses: list[Tensor]) -> list[float]:
    """The losses as numbers: of all processes, the same in each, so that all of them decide alike."""
    values = torch.stack(losses)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return [float(value) for value in values.tolist()]


def _smoothed(losses: list[float], smoothing: float) -> list[float]:
    first = [loss for loss in losses[: _tenth(len(losses))] if math.isfinite(loss)]
    highest = max(first, default=math.nan)
    bounded = [min(loss, highest) if math.isfinite(loss) else highest for loss in losses]
    sums = [0.0] * len(losses)
    weights = [0.0] * len(losses)
    for places in (range(len(losses)), reversed(range(len(losses)))):
        total = weight = 0.0  # of what is on this side
        for i in places:
            sums[i] += total
            weights[i] += weight
            total = (1.0 - smoothing) * (total + bounded[i])
            weight = (1.0 - smoothing) * (weight + 1.0)
    return [(loss + total) / (1.0 + weight) for loss, total, weight in zip(bounded, sums, weights, strict=True)]


def _suggested(rates: tuple[float, ...], smoothed: tuple[float, ...]) -> float | None:
    count = next((i for i, value in enumerate(smoothed) if not math.isfinite(value)), len(smoothed))
    if count == 0:
        return None
    end = min(range(count), key=smoothed.__getitem__)
    slopes = {i: smoothed[i + 1] - smoothed[i - 1] for i in range(1, end)}  # steps are even in the logarithm
    steepest = min(slopes, key=slopes.__getitem__, default=0)
    return rates[steepest] if slopes.get(steepest, 0.0) < 0.0 else None
