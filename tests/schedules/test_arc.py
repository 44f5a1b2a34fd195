"""Arc: one curve, stretched and shifted."""

from __future__ import annotations

import pytest
import torch

from nexus.schedules import Arc, Schedule, evaluate

ARCS = [
    Arc("cosine", high=1.0, low=0.25, span=10.0),
    Arc("cosine", high=0.0, low=1.0, span=7.5, shift=0.5),
    Arc("staircase", high=1.0, low=0.0, span=2.4, q=0.9),
    Arc("log", high=1.0, low=0.0, span=1.0, shift=1.0, k=0.2),
    Arc("inverse", high=1.0, low=0.0, span=20.0),
]


@pytest.mark.parametrize("arc", ARCS)
def test_an_arc_is_a_value_that_every_evaluator_takes(arc):
    assert Schedule.from_dict(arc.to_dict()) == arc
    assert (2 * arc)(3) == pytest.approx(2 * arc(3), rel=1e-15)
    steps = torch.arange(50)
    expected = torch.tensor([arc(step) for step in range(50)], dtype=torch.float64)
    torch.testing.assert_close(evaluate(arc, steps), expected, rtol=1e-14, atol=1e-16)


def test_a_cosine_goes_on_as_a_wave():
    wave = Arc("cosine", high=1.0, low=0.25, span=10.0)
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("power", {"k": -1.0}), "k and q must be above 0"),
        (("cosine", {"q": 0.0}), "k and q must be above 0"),
        (("exponential", {}), r"k must not be 1 \(0 is q\*\*p\)"),
        (("staircase", {"q": 0.0}), "q must be above 0"),
        (("sqrt", {"shift": -1.0}), "shift must be 0 or above"),
        (("inverse", {"shift": -2.0}), "shift must be above -span"),
        (("log", {}), "shift must be above 0"),
    ],
)
def test_numbers_that_would_make_nan(arguments: tuple[str, dict[str, float]], words: str) -> None:
    curve, numbers = arguments
    with pytest.raises(ValueError, match=words):
        Arc(curve, high=1.0, low=0.0, span=2.0, **numbers)


@pytest.mark.parametrize(("curve", "last"), [("linear", 0.25), ("sqrt", 0.25), ("power", 0.25), ("rise", 1.0)])
def test_what_ends_stays(curve: str, last: float) -> None:
    arc = Arc(curve, high=1.0, low=0.25, span=2.5, shift=1.0, k=1.0, q=0.5)
    assert arc.length == 2
    assert arc.values(2, 5) == [last] * 3 == [arc(2**53)] * 3
    assert Arc(curve, high=1.0, low=0.25, span=2.5, shift=3.0).values(0, 2) == [last] * 2
