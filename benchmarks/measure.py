"""Sets nexus beside each peer, and says how many times as fast one is as the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import contestants, peers, training
from benchmarks.cases import BFLOAT16, CUDA, AnyCase, TrainingCase
from benchmarks.rows import Comparison, LeftOut, Row
from benchmarks.timing import PROCESSOR, Device, Sample, interleaved, microseconds

CPU_LIMIT_S = 8.0  # of training; a busy machine makes the many small operations of a step very slow
BFLOAT16_REPEATS = 30
"""At most: 150 steps. From step 256 on a bfloat16 second moment grows no more, and the two sides part."""

Side = Any  # contestants.Contestant of both, or training.Trainee


class Disagreement(Exception):
    """Two sides that were timed have not done the same."""


class PeerFailure(Exception):
    """The other side cannot do the job here."""


def measure(case: AnyCase, repeats: int, device: Device = PROCESSOR) -> Iterator[Row | LeftOut]:
    """Time a case: every job, beside every peer, at most `repeats` pairs each.

    Whatever one of them ends in, the others go on.
    """
    repeats = min(repeats, BFLOAT16_REPEATS) if case.dtype == BFLOAT16 else repeats
    for job in case.jobs_on(device.kind):
        for name in case.peers_on(device.kind, job):
            yield _row_or_reason(case, job, name, repeats, device)
            device.settle()


def _row_or_reason(case: AnyCase, job: str, name: str, repeats: int, device: Device) -> Row | LeftOut:
    reason, failed = peers.unavailable(name), False
    if reason is None:
        try:
            return _beside(case, job, name, repeats, device)
        except PeerFailure as error:
            reason = str(error)
        except Disagreement as error:
            reason, failed = str(error), True
        except Exception as error:  # of whatever kind: kernels run here that nobody may have run before
            reason, failed = described(error), True
    return LeftOut(case.name, job, name, reason, failed)


def described(error: Exception) -> str:
    """An exception in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


def _beside(case: AnyCase, job: str, name: str, repeats: int, device: Device) -> Row:
    sides: Any = training if isinstance(case, TrainingCase) else contestants
    ours = sides.nexus(case, job, device)
    theirs = _peer(sides, case, job, name, device)
    ours.prepare()
    limit_s = device.limit_s or (CPU_LIMIT_S if isinstance(case, TrainingCase) else None)
    pairs = _timed(ours.call, theirs.call, repeats, device, limit_s)
    row = Row(
        case=case.name,
        title=case.title,
        device=device.kind,
        dtype=case.dtype,
        tensors=len(ours.params),
        elements=sum(param.numel() for param in ours.params),
        groups=case.groups,
        job=job,
        peer=name,
        backend=ours.backend,
        time=Comparison.of([(a.us, b.us) for a, b in pairs]),
        pairs=len(pairs),
        difference=_checked(case, job, name, ours, theirs),
        bytes_moved=case.bytes_moved(job),
        host=Comparison.of([(a.host_us, b.host_us) for a, b in pairs]) if device.kind == CUDA else None,
        remark=theirs.remark,
    )
    if device.kind != CUDA or not theirs.params:
        return row
    if isinstance(case, TrainingCase):
        row = replace(row, loop=_loop(case.loop_steps, ours, theirs, repeats, device))
    else:
        row = _with_replays(row, ours, theirs, repeats, device)
    if row.replay is None or row.replay.peer is not None:  # else nexus has gone further than its peer
        row = replace(row, difference=_checked(case, job, name, ours, theirs))
    return row


def _peer(sides: Any, case: AnyCase, job: str, name: str, device: Device) -> Side:
    """One that has taken its first steps, which tells a peer's own failures from those of nexus."""
    try:
        theirs = sides.peer(case, job, name, device)
        theirs.prepare()
        device.wait()
    except Exception as error:
        raise PeerFailure(described(error)) from error
    return theirs


def _timed(
    first: Callable[[], object], second: Callable[[], object], repeats: int, device: Device, limit_s: float | None
) -> list[tuple[Sample, Sample]]:
    return interleaved(partial(device.sample, first), partial(device.sample, second), repeats, limit_s)


def _checked(case: AnyCase, job: str, name: str, ours: Side, theirs: Side) -> float | None:
    difference: float | None = ours.difference(theirs)
    if difference is not None and not difference < case.tolerance:
        raise Disagreement(
            f"{case.name}, {job}: the {ours.compared} of nexus and of its peer ({name}) differ by {difference:.1e} "
            "of the way that they went"
        )
    return difference


def _with_replays(row: Row, ours: Side, theirs: Side, repeats: int, device: Device) -> Row:
    """With replays of both in turns, or of nexus alone; why one was not captured is a remark."""
    try:
        first = _captured(ours, device)
    except Exception as error:
        return _with_remark(row, f"nexus was not captured: {described(error)}")
    if first is None:
        return row
    try:
        second = _captured(theirs, device)
    except Exception as error:
        second, row = None, _with_remark(row, f"the peer was not captured: {described(error)}")
    pairs = _timed(first, second or _nothing, repeats, device, device.limit_s)
    device_times = Comparison.of([(a.us, b.us) for a, b in pairs])
    host_times = Comparison.of([(a.host_us, b.host_us) for a, b in pairs])
    if second is None:
        device_times, host_times = (replace(times, peer=None, ratio=None) for times in (device_times, host_times))
    return replace(row, replay=device_times, replay_host=host_times)


def _with_remark(row: Row, remark: str) -> Row:
    return replace(row, remark="; ".join(filter(None, (row.remark, remark))))


def _captured(side: Side, device: Device) -> Callable[[], object] | None:
    if side.in_graph is None:
        return None
    replay = device.capture(side.call, side.in_graph)
    beside = side.beside_graph
    if replay is None or beside is None:
        return replay

    def call() -> None:
        replay()
        beside()

    return call


def _loop(steps: int, ours: Side, theirs: Side, repeats: int, device: Device) -> Comparison:
    """What a step takes of several that are enqueued in a row, until the device has done the last."""
    first, second = (partial(_step_us, steps, side.call, device) for side in (ours, theirs))
    return Comparison.of(interleaved(first, second, repeats, device.limit_s))


def _step_us(steps: int, call: Callable[[], object], device: Device) -> float:
    def loop() -> None:
        for _ in range(steps):
            call()
        device.wait()

    device.wait()
    return microseconds(loop) / steps


def _nothing() -> None:
    pass
