"""Lines, and points with curves between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from nexus.arguments import check_choice, check_count, check_number, shown
from nexus.schedules.base import Schedule
from nexus.schedules.curves import MAX_SEGMENTS, Curve, Segment, level, line, segment

JOINTS = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    r"""A line from one rate to another, which then stays.

    With :math:`N` the total, in updates:

    .. math::
        \eta(t) = \eta_{start} + \min(\frac{t}{N}, 1) (\eta_{end} - \eta_{start})

    Step 0 has `start_lr`, step N - 1 is one part in N short of the end, and step N is the first of `end_lr`.

    Args:
        start_lr: the rate at step 0, 0 or above.
        end_lr: the rate from `total_steps` on, 0 or above; more or less than `start_lr`.
        total_steps: N, in updates, at least 1.

    The same in torch: `LinearLR`, with `total_iters` for N and factors for rates.

    >>> Linear(start_lr=1.0, end_lr=0.5, total_steps=4).values(0, 6)
    [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    """

    start_lr: float
    end_lr: float
    total_steps: int
    _rates = ("start_lr", "end_lr")

    def __post_init__(self) -> None:
        self._set(start_lr=check_number("start_lr", self.start_lr), end_lr=check_number("end_lr", self.end_lr))
        self._check_counts(total_steps=1)

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"linear"` or `"done"`."""
        return "linear" if check_count("step", step) < self.total_steps else "done"

    def segments(self) -> tuple[Segment, ...]:
        """Two rows: the line, the end."""
        return line(0, self.total_steps, self.start_lr, self.end_lr), level(self.total_steps, self.end_lr)


@dataclass(frozen=True)
class Piecewise(Schedule):
    r"""Rates at given steps, with steps, lines or half-cosines between them.

    With the points :math:`(t_i, \eta_i)`, :math:`p = (t - t_i) / (t_{i+1} - t_i)`, and :math:`f(p) = 0`
    (`"constant"`), :math:`p` (`"linear"`) or :math:`(1 - \cos \pi p) / 2` (`"cosine"`):

    .. math::
        \eta(t) = \eta_i + f(p) (\eta_{i+1} - \eta_i) \qquad t_i \le t < t_{i+1}

    Each point's step has its rate exactly; the last rate stays.

    Args:
        points: pairs (step, rate) by ascending step, the first of step 0; rates are 0 or above.
        kind: `"constant"`, `"linear"` or `"cosine"`: what is between two points.

    The same in optax: `piecewise_interpolate_schedule` and, of constants, `piecewise_constant_schedule`, which take
    factors where rates are given here.

    >>> Piecewise([(0, 0.0), (2, 1.0), (6, 0.0)], kind="linear").values(0, 8)
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    points: tuple[tuple[int, float], ...]
    _: KW_ONLY
    kind: str = "constant"

    def __post_init__(self) -> None:
        self._set(points=_checked_points(self.points), kind=check_choice("kind", self.kind, JOINTS))

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"piece i"` of those between two points, or `"done"`."""
        step = check_count("step", step)
        index = sum(start <= step for start, _ in self.points)
        return "done" if index == len(self.points) else f"piece {index - 1}"

    def segments(self) -> tuple[Segment, ...]:
        """A row from each point on."""
        rows = [
            self._row(start, end - start, first, last)
            for (start, first), (end, last) in itertools.pairwise(self.points)
        ]
        return (*rows, level(*self.points[-1]))

    def _row(self, start: int, period: int, first: float, last: float) -> Segment:
        if self.kind == "constant":
            return level(start, first)
        if self.kind == "linear":
            return line(start, period, first, last)
        return segment(Curve.COSINE, start, period, first, last)

    def _scaled(self, factor: float) -> Piecewise:
        return replace(self, points=tuple((step, factor * rate) for step, rate in self.points))


def _checked_points(points: Any) -> tuple[tuple[int, float], ...]:
    allowed = "points must be pairs (step, rate) by ascending step, the first of step 0"
    if not isinstance(points, Sequence) or isinstance(points, str):
        raise TypeError(f"{allowed}, got {shown(points)}")
    if not 1 <= len(points) <= MAX_SEGMENTS:
        raise ValueError(f"{allowed}, from 1 to {MAX_SEGMENTS:,} of them, got {len(points):,}")
    checked: list[tuple[int, float]] = []
    for i, point in enumerate(points):
        if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 2:
            raise TypeError(f"{allowed}, got {shown(point)} as point {i}")
        step = check_count(f"the step of points[{i}]", point[0])
        if step <= checked[-1][0] if checked else step != 0:
            raise ValueError(f"{allowed}, got step {step} as that of point {i}")
        checked.append((step, check_number(f"the rate of points[{i}]", point[1])))
    return tuple(checked)
