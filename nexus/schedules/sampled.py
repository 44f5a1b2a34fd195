"""Any rates at all: a table of them, with lines between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

from nexus.arguments import check_count, check_number, shown
from nexus.schedules.base import Schedule
from nexus.schedules.curves import MAX_SAMPLES, NEVER, Curve, Layer, level, sampled, segment, start


@dataclass(frozen=True)
class Sampled(Schedule):
    r"""A table of rates, with lines between them.

    With the rates :math:`\eta_0 \dots \eta_n`, one for every :math:`E` updates, :math:`i = \lfloor t / E \rfloor` and
    :math:`p = t / E - i`:

    .. math::
        \eta(t) = \begin{cases}
        \eta_i + p (\eta_{i+1} - \eta_i) & t < n E \\
        \eta_n & t \ge n E
        \end{cases}

    Step :math:`i E` has the rate i exactly; the last rate stays. `Schedule.from_function` makes such a table.

    Args:
        rates: numbers, 0 or above, at most 1,048,576; 8 bytes each on the device.
        every: E, in updates, at least 1.
        error: the largest distance to what the table was made of, for information; it changes no rate.

    >>> Sampled([1.0, 0.5, 2.0], every=2).values(0, 6)
    [1.0, 0.75, 0.5, 1.25, 2.0, 2.0]
    """

    rates: tuple[float, ...]
    _: KW_ONLY
    every: int = 1
    error: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.rates, Sequence) or isinstance(self.rates, str):
            raise TypeError(f"rates must be a list of numbers, got {shown(self.rates)}")
        if not 1 <= len(self.rates) <= MAX_SAMPLES:
            raise ValueError(f"rates must be from 1 to {MAX_SAMPLES:,} numbers, got {len(self.rates):,} of them")
        self._check_counts(every=1)
        rates = tuple(check_number(f"rates[{i}]", rate) for i, rate in enumerate(self.rates))
        self._set(rates=rates, error=check_number("error", self.error))

    def __call__(self, step: int) -> float:
        return sampled(self.rates, 0, len(self.rates), check_count("step", step) / self.every)

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"sampled"` or `"done"`."""
        return "sampled" if check_count("step", step) < self._end else "done"

    def layers(self) -> tuple[Layer, ...]:
        """One layer: a row of all samples, then the last of them."""
        count, span = float(len(self.rates)), float(self.every)
        row = segment(Curve.SAMPLED, 0, NEVER, 1.0, span=span, k=0.0, q=count)
        return (Layer((row, level(start(self._end), self.rates[-1])), samples=self.rates),)

    @property
    def _end(self) -> int:
        """The step of the last sample."""
        return (len(self.rates) - 1) * self.every

    def _scaled(self, factor: float) -> Sampled:
        return replace(self, rates=tuple(factor * rate for rate in self.rates), error=factor * self.error)


def sampled_from(fn: Callable[[int], float], steps: int, every: int = 1) -> Sampled:
    """See `Schedule.from_function`."""
    if not callable(fn):
        raise TypeError(f"fn must be a callable that takes a step, got {shown(fn)}")
    steps, every = check_count("steps", steps), check_count("every", every, low=1)
    if -(-steps // every) + 1 > MAX_SAMPLES:
        least = -(-steps // (MAX_SAMPLES - 1))
        raise ValueError(
            f"every must be at least {least:,} for steps={steps:,}, as a table holds {MAX_SAMPLES:,} rates, "
            f"got {every}"
        )
    rates = [_rate(fn, step) for step in range(steps + 1)]
    kept = rates[::every] if steps % every == 0 else [*rates[::every], rates[-1]]
    schedule = Sampled(tuple(kept), every=every)
    error = max(abs(rate - schedule(step)) for step, rate in enumerate(rates))
    return replace(schedule, error=error)


def _rate(fn: Callable[[int], float], step: int) -> float:
    try:
        rate = fn(step)
    except Exception as error:
        raise ValueError(f"fn must return a rate at every step, but at step {step} it raised {error!r}") from error
    return check_number(f"the value of fn at step {step}", rate)
