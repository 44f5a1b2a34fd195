"""Arc: one curve, stretched and shifted."""

from __future__ import annotations

import pytest
import torch

from nexus.schedules import Arc, Schedule, evaluate

ARCS = [
    Arc("cosine", 1.0, 0.25, 10.0),
    Arc("cosine", 0.0, 1.0, 7.5, shift=0.5),
    Arc("staircase", 1.0, 0.0, 2.4, q=0.9),
    Arc("log", 1.0, 0.0, 1.0, shift=1.0, k=0.2),
    Arc("inverse", 1.0, 0.0, 20.0),
]


@pytest.mark.parametrize("arc", ARCS)
def test_an_arc_is_a_value_that_every_evaluator_takes(arc):
    assert Schedule.from_dict(arc.to_dict()) == arc
    assert (2 * arc)(3) == pytest.approx(2 * arc(3), rel=1e-15)
    steps = torch.arange(50)
    expected = torch.tensor([arc(step) for step in range(50)], dtype=torch.float64)
    torch.testing.assert_close(evaluate(arc, steps), expected, rtol=1e-14, atol=1e-16)


def test_a_cosine_goes_on_as_a_wave():
    wave = Arc("cosine", 1.0, 0.25, 10.0)
    assert [wave(step) for step in (0, 10, 20)] == [1.0, 0.25, 1.0]
    assert wave(20 * 10**14) == 1.0
    assert wave.length is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curve": "circle"}, "curve must be one of"),
        ({"span": 0.0}, "span must be"),
        ({"high": -1.0}, "high must be"),
        ({"shift": float("nan")}, "shift must be"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        Arc(**{"curve": "cosine", "high": 1.0, "low": 0.0, "span": 10.0, **change})
