"""What a run has changed of its schedule, in plain types, and what a resumed run takes over of that.

One rule for optimizers and schedulers: the schedule given to the constructor stands, a warning names each field in
which the saved one differs, and the saved edits are made to it. `extended` is the number of updates by which
`extend_stable` has made the stable phase longer; `decay_start` and `decay_from` are the step and the rate from which
`begin_decay` lets the decay go.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from nexus.arguments import check_count, check_number, shown
from nexus.schedules import WSD, Schedule, reports
from nexus.schedules.base import restored
from nexus.schedules.clock import unclocked
from nexus.schedules.curves import NEVER
from nexus.schedules.plateau import inner_of

S = TypeVar("S", bound=Schedule)

_SHORT = reprlib.Repr()  # of a schedule, both ends
_SHORT.maxother = _SHORT.maxstring = 120

_DECAY_EDITS = ("decay_start", "decay_from")


def edit_names(schedule: Schedule) -> tuple[str, ...]:
    """What can be edited of a schedule. All are saved: torch.distributed.checkpoint loads no entry that is new."""
    return ("extended", *_DECAY_EDITS) if isinstance(inner_of(unclocked(schedule)), WSD) else ()


def saved_form(schedule: Schedule, edits: dict[str, Any]) -> dict[str, Any]:
    """The edits of a schedule as state dicts have them; None is none."""
    return dict.fromkeys(edit_names(schedule)) | edits


def checked_edits(schedule: Schedule, saved: Any, name: str) -> dict[str, Any]:
    """The edits that `saved_form` wrote.

    Raises:
        TypeError, ValueError: naming the edit, what was given and what is allowed.
    """
    allowed = edit_names(schedule)
    edits = {} if saved is None else saved
    if isinstance(edits, dict):
        edits = {key: value for key, value in edits.items() if value is not None}
    if not isinstance(edits, dict) or not set(edits) <= set(allowed) or len(set(_DECAY_EDITS) & set(edits)) == 1:
        raise ValueError(f"{name} must be a dict of {sorted(allowed) or 'nothing'}, got {shown(edits)}")
    for edit, value in edits.items():
        if edit == "decay_from":
            edits[edit] = check_number(f"{edit} in {name}", value)
        else:
            edits[edit] = check_count(f"{edit} in {name}", value, high=NEVER)
    return edits


def checked_pieces(saved: Any, name: str) -> list[tuple[int, Schedule, bool]]:
    """What `ScheduleTable.saved_pieces` wrote.

    Raises:
        TypeError, ValueError: naming it, what was given and what is allowed.
    """
    if saved is None:
        return []
    try:
        found = json.loads(saved)
        return [(check_count("step", step), Schedule.from_dict(piece), bool(own)) for step, piece, own in found]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be None or JSON of [step, schedule, whether it was given], {error}") from None


def checked_reports(saved: Any, name: str) -> list[float] | None:
    """What `ScheduleTable.reports` wrote; None where a schedule has none.

    Raises:
        ValueError: naming it, what was given and what is allowed.
    """
    if saved is None:
        return None
    is_right = isinstance(saved, (list, tuple)) and len(saved) == len(reports.NAMES)
    if is_right and all(isinstance(each, (int, float)) for each in saved):
        _, bad, cooldown, _, waiting, factor, count, base = map(float, saved)
        counts = (bad, cooldown, waiting, count)
        if all(each >= 0 and each.is_integer() for each in counts) and 0.0 <= factor < math.inf and base > 0.0:
            return [float(each) for each in saved]
    raise ValueError(f"{name} must be the numbers {', '.join(reports.NAMES)}, got {shown(saved)}")


def differences(name: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What a warning says of each field in which `before`, a saved schedule, is another one than `now`."""
    now, before = ({**Schedule.later_fields(each["type"]), **each} for each in (now, before))
    found: list[str] = []
    for field in now if now["type"] == before["type"] else ("type",):
        for part, ours, theirs in _pairs(f"{name}.{field}", now[field], before[field]):
            if isinstance(ours, Mapping) and ours["type"] == theirs["type"]:
                found += differences(part, ours, theirs)
            elif ours != theirs:
                was, is_now = (_SHORT.repr(restored(each)) for each in (theirs, ours))
                note = f"{part} was {was} in the checkpoint and is {is_now} now"
                found.append(f"{note}; the run goes on with the latter")
    return found


def _pairs(name: str, ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """Two values of a field; where they are as many schedules, each of them beside the other."""
    if isinstance(ours, list) and len(ours) == len(theirs) and all(isinstance(each, Mapping) for each in ours):
        return [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(ours, theirs, strict=True))]
    return [(name, ours, theirs)]


def edited(schedule: S, edits: dict[str, Any]) -> S:
    """The schedule with these edits.

    Raises:
        ValueError: there is none, as where its minimum is above the rate that the decay began from.
    """
    if not isinstance(schedule, WSD):
        return schedule
    if "decay_start" in edits:
        start = edits["decay_start"]
        warmup, peak = min(schedule.warmup_steps, start), edits["decay_from"]
        begin = schedule.warmup_start_lr
        return replace(
            schedule,
            warmup_steps=warmup,
            stable_steps=start - warmup,
            peak_lr=peak,
            warmup_start_lr=begin if begin is None else min(begin, peak),
        )
    if "extended" in edits and schedule.stable_steps is not None:
        return replace(schedule, stable_steps=schedule.stable_steps + edits["extended"])
    return schedule


def resumed(
    schedule: Schedule, saved: Schedule, state: dict[str, Any], step: int
) -> tuple[dict[str, Any], list[str]]:
    """What a scheduler that was given `schedule` takes over of `state`, saved at `step` with the schedule `saved`.

    Returns:
        The edits of `schedule` to go on with, and what is to be warned of.

    Raises:
        ValueError: the saved edits are none, or do not fit.
    """
    is_old = "edits" not in state
    try:
        edits = _inferred_edits(schedule, saved, step) if is_old else checked_edits(schedule, state["edits"], "edits")
        going_on = edited(schedule, edits)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the loaded state dict has edits, by begin_decay() or extend_stable(), that {schedule!r} cannot have: "
            f"{error}. Make the scheduler with the saved schedule, {saved!r}; or set the state dict's 'edits' to "
            "{}, to go on without them"
        ) from None
    notes = []
    if is_old and edits:
        notes.append(
            "the loaded state dict is an earlier nexus's, which does not say what begin_decay() or extend_stable() "
            f"did; by its schedule that was {edits}, with which the run goes on"
        )
    now = going_on if is_old else schedule  # an old one has the edits in the fields of its schedule
    return edits, notes + differences("schedule", now.to_dict(), saved.to_dict())


def _inferred_edits(schedule: Schedule, standing: Schedule, step: int) -> dict[str, Any]:
    """The edits that may have made `standing` of a schedule: what earlier releases saved, at `step`, was that alone.

    A decay that has begun is one, unless it is where the schedule has it; so is a stable phase that is longer, where
    all else is equal.
    """
    if not isinstance(schedule, WSD) or not isinstance(standing, WSD) or standing.stable_steps is None:
        return {}
    start = standing.warmup_steps + standing.stable_steps
    own = None if schedule.stable_steps is None else schedule.warmup_steps + schedule.stable_steps
    if standing.phase(step) in ("decay", "done"):
        return {} if start == own else {"decay_start": start, "decay_from": standing.peak_lr}
    if own is not None and own < start and replace(schedule, stable_steps=standing.stable_steps) == standing:
        return {"extended": start - own}
    return {}
