"""Rates that rise before they fall: once, or again and again."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nexus.arguments import check_choice, check_count, check_fraction, check_number
from nexus.schedules.base import Schedule
from nexus.schedules.curves import NEVER, Curve, Layer, Op, Segment, level, line, segment


@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    r"""Up to the peak and far down again, by torch's convention.

    Between the places :math:`a_0 = 0`, :math:`a_1 = uN - 1` and :math:`a_2 = N - 1`, which need not be integers, with
    the rates :math:`\eta_0 = s \eta_{peak}`, :math:`\eta_1 = \eta_{peak}` and :math:`\eta_2 = e \eta_{peak}`, and
    with :math:`f(p) = (1 - \cos \pi p) / 2` (`"cosine"`) or :math:`p` (`"linear"`):

    .. math::
        \eta(t) = \eta_i + f(\frac{t - a_i}{a_{i+1} - a_i}) (\eta_{i+1} - \eta_i) \qquad a_i < t \le a_{i+1}

    With `three_phase`, the rate goes down as it came up: the places are 0, :math:`uN - 1`, :math:`2uN - 2` and
    :math:`N - 1`, with the rates :math:`s \eta_{peak}`, :math:`\eta_{peak}`, :math:`s \eta_{peak}` and
    :math:`e \eta_{peak}`.

    Step 0 has :math:`s \eta_{peak}`, unless :math:`uN \le 1`, when there is no way up. The end is reached at step
    N - 1, not N, and stays. The peak is the rate of a step only if :math:`uN` is an integer.

    Args:
        peak_lr: the highest rate, above 0.
        total_steps: N, in updates, at least 1.
        up_fraction: u, from 0 to 1, or to 0.5 with `three_phase`; torch's `pct_start`.
        start_factor: s, from 0 to 1; one over torch's `div_factor`.
        end_factor: e, from 0 to 1; one over the product of torch's `div_factor` and `final_div_factor`.
        kind: `"cosine"` or `"linear"`; torch's `anneal_strategy`.
        three_phase: whether there is a third phase.

    Source: Smith & Topin 2018, arXiv:1708.07120. The same in torch: `OneCycleLR`, which goes beyond its end at step
    N, and then raises an error.

    >>> schedule = OneCycle(peak_lr=1.0, total_steps=11, up_fraction=0.5, kind="linear")
    >>> [round(schedule(step), 3) for step in (0, 2, 4, 5, 10)]
    [0.04, 0.467, 0.893, 0.909, 0.0]
    """

    peak_lr: float
    total_steps: int
    up_fraction: float = 0.3
    start_factor: float = 1 / 25
    end_factor: float = 1 / 25e4
    kind: str = "cosine"
    three_phase: bool = False
    _rates = ("peak_lr",)

    def __post_init__(self) -> None:
        self._set(peak_lr=check_number("peak_lr", self.peak_lr, positive=True))
        self._check_counts(total_steps=1)
        for name in ("up_fraction", "start_factor", "end_factor"):
            self._set(**{name: check_fraction(name, getattr(self, name))})
        self._set(kind=check_choice("kind", self.kind, ("cosine", "linear")))
        if not isinstance(self.three_phase, bool):
            raise TypeError(f"three_phase must be True or False, got {self.three_phase!r}")
        if self.three_phase and self.up_fraction > 0.5:
            raise ValueError(f"up_fraction must be from 0 to 0.5 with three_phase=True, got {self.up_fraction!r}")

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"up"`, `"down"`, `"annihilation"` (the third phase) or `"done"`."""
        step = check_count("step", step)
        if step >= self.total_steps - 1:
            return "done"
        return next(name for name, _, end, _, _ in self._phases() if step <= end)

    def segments(self) -> tuple[Segment, ...]:
        """A row for each phase that has updates, then the end."""
        last = self.total_steps - 1
        rows = []
        for _, begin, end, first, final in self._phases():
            start = max(0, math.floor(begin) + 1) if begin else 0
            if start <= min(end, last) and end > 0.0:
                span, offset = end - begin, start - begin
                if self.kind == "linear":
                    rows.append(line(start, NEVER, first, final)._replace(offset=offset, span=span))
                else:
                    rows.append(segment(Curve.COSINE, start, NEVER, first, final, offset=offset, span=span))
        final = next(final for _, _, end, _, final in self._phases() if last <= end)
        return (*rows, level(last, final))

    def _phases(self) -> list[tuple[str, float, float, float, float]]:
        """The name, the last step of the phase before, the last step, and the rates there, of each phase."""
        first, end = self.peak_lr * self.start_factor, self.peak_lr * self.end_factor
        up, last = self.up_fraction * self.total_steps - 1.0, self.total_steps - 1.0
        if not self.three_phase:
            return [("up", 0.0, up, first, self.peak_lr), ("down", up, last, self.peak_lr, end)]
        down = 2.0 * self.up_fraction * self.total_steps - 2.0
        return [
            ("up", 0.0, up, first, self.peak_lr),
            ("down", up, down, self.peak_lr, first),
            ("annihilation", down, last, first, end),
        ]


@dataclass(frozen=True, kw_only=True)
class Cyclic(Schedule):
    r"""Triangles from the base to the peak and back, again and again.

    With :math:`U, D` the updates up and down, :math:`c = \lfloor t / (U + D) \rfloor` the cycle and :math:`u` the
    steps since it began:

    .. math::
        \eta(t) = \eta_{base} + g(t) \min(\frac{u}{U}, \frac{U + D - u}{D}) (\eta_{peak} - \eta_{base})

    where :math:`g(t)` is 1 (`"triangular"`), :math:`2^{-c}` (`"triangular2"`) or :math:`\gamma^t` (`"exp_range"`).

    Step 0 has the base, and so has the first step of each cycle; step U has the peak, or what :math:`g` leaves of it.
    There is no last step.

    Args:
        base_lr: the lowest rate, from 0 to `peak_lr`.
        peak_lr: the highest rate, above 0.
        up_steps: U, in updates, at least 1.
        down_steps: D, in updates, at least 1; None is as many as `up_steps`.
        mode: `"triangular"`, `"triangular2"` or `"exp_range"`.
        gamma: :math:`\gamma` of `"exp_range"`, above 0 and at most 1.

    Source: Smith 2017, arXiv:1506.01186. The same in torch: `CyclicLR`.

    >>> Cyclic(base_lr=0.0, peak_lr=1.0, up_steps=2, down_steps=4).values(0, 8)
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.5]
    """

    base_lr: float
    peak_lr: float
    up_steps: int
    down_steps: int | None = None
    mode: str = "triangular"
    gamma: float = 1.0
    _rates = ("base_lr", "peak_lr")

    def __post_init__(self) -> None:
        peak = check_number("peak_lr", self.peak_lr, positive=True)
        base = check_number("base_lr", self.base_lr)
        if base > peak:
            raise ValueError(f"base_lr must be a number from 0 to peak_lr={peak!r}, got {base!r}")
        self._set(base_lr=base, peak_lr=peak, up_steps=check_count("up_steps", self.up_steps, low=1))
        down = self.up_steps if self.down_steps is None else self.down_steps
        self._set(down_steps=check_count("down_steps", down, low=1, also="None (as up_steps)"))
        self._set(mode=check_choice("mode", self.mode, ("triangular", "triangular2", "exp_range")))
        self._set(gamma=check_fraction("gamma", self.gamma, positive=True))

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"up"` or `"down"`."""
        return "up" if check_count("step", step) % self._cycle < self.up_steps else "down"

    def layers(self) -> tuple[Layer, ...]:
        """The triangles; where they shrink, of their height above the base, times a decay, plus the base."""
        if self.mode == "triangular":
            return (self._triangles(self.peak_lr, self.base_lr),)
        if self.mode == "triangular2":
            decay = segment(Curve.STAIRCASE, 0, NEVER, 1.0, span=float(self._cycle), q=0.5)
        else:
            decay = segment(Curve.EXPONENTIAL, 0, NEVER, 1.0, span=1.0, k=0.0, q=self.gamma)
        height = self._triangles(self.peak_lr - self.base_lr, 0.0)
        return height, Layer((decay,), Op.TIMES), Layer((level(0, self.base_lr),), Op.PLUS)

    def _triangles(self, high: float, low: float) -> Layer:
        rows = line(0, self.up_steps, low, high), line(self.up_steps, self._cycle - self.up_steps, high, low)
        return Layer(rows, repeat_start=0, repeat_length=self._cycle)

    @property
    def _cycle(self) -> int:
        """The updates of a cycle."""
        return self.up_steps + (self.up_steps if self.down_steps is None else self.down_steps)
