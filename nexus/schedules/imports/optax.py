"""Schedules of optax's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nexus.schedules.sampled import Sampled, sampled_from


def from_optax(fn: Callable[[int], Any], steps: int) -> Sampled:
    """The schedule of an optax schedule: a table of its values from step 0 to `steps`; the last stays.

    Without jax's x64 option, optax computes in float32: the table has the rates as they are, float32's rounding
    included.

    Args:
        fn: an optax schedule: a callable of the step, that returns a number or an array of one.
        steps: how many updates the table is to hold, at most 1,048,575; 8 bytes each on the device.

    Raises:
        TypeError, ValueError: a callable that raises, or returns a negative number, NaN or no number at some step.

    >>> from_optax(lambda step: 1.0 / (1 + step), steps=3).values(0, 4)
    [1.0, 0.5, 0.3333333333333333, 0.25]
    """
    if not callable(fn):
        return sampled_from(fn, steps)  # which raises
    return sampled_from(lambda step: float(fn(step)), steps)
