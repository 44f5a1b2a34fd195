"""Sets nexus beside each peer, and says how many times as fast one is as the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import contestants, peers, training
from benchmarks.cases import BFLOAT16, BITSANDBYTES, CUDA, TORCHAO_8_BIT, AnyCase, TrainingCase
from benchmarks.report import Comparison, LeftOut, Row
from benchmarks.timing import PROCESSOR, Call, Device, Sample, interleaved, microseconds

QUICK_LIMIT_S = 0.8
CPU_LIMIT_S = 8.0  # of training; a busy machine makes the many small operations of a step very slow
BFLOAT16_REPEATS = 30
"""At most: 150 steps. From step 256 on a bfloat16 second moment grows no more, and the two sides part."""
SLOW_PEERS, SLOW_REPEATS = (TORCHAO_8_BIT, BITSANDBYTES), 5  # a step of GPT-2 takes seconds on a CPU

Side = Any  # contestants.Contestant of both, or training.Trainee


class Disagreement(Exception):
    """Two sides that were timed have not done the same."""


def measure(
    case: AnyCase, repeats: int, device: Device = PROCESSOR, backend: str = "auto", limit_s: float | None = None
) -> Iterator[Row | LeftOut]:
    """Time a case: every job, beside every peer, at most `repeats` pairs each, and about `limit_s` seconds.

    Whatever one of them ends in, the others go on. `backend` is nexus's, but in training.
    """
    repeats = min(repeats, BFLOAT16_REPEATS) if case.dtype == BFLOAT16 else repeats
    for job, name in case.comparisons(device.kind):
        pairs = min(repeats, SLOW_REPEATS) if name in SLOW_PEERS else repeats
        yield _row_or_reason(case, job, name, pairs, device, backend, limit_s)
        device.settle()


def _row_or_reason(
    case: AnyCase, job: str, name: str, repeats: int, device: Device, backend: str, limit_s: float | None
) -> Row | LeftOut:
    left_out = partial(LeftOut, case.name, job, name)
    reason = peers.unavailable(name)
    if reason is not None:
        return left_out(reason, failed=False)
    sides: Any = training if isinstance(case, TrainingCase) else contestants
    try:  # the peer's first steps tell its own failures from those of nexus
        theirs = sides.peer(case, job, name, device)
        theirs.prepare()
        device.wait()
    except Exception as error:
        return left_out(described(error), failed=False)
    try:
        in_backend = () if isinstance(case, TrainingCase) else (backend,)
        ours = sides.nexus(case, job, device, *in_backend)
        return _beside(case, job, name, ours, theirs, repeats, device, limit_s)
    except Exception as error:  # of whatever kind: kernels run here that nobody may have run before
        return left_out(described(error), failed=True)


def described(error: Exception) -> str:
    """An exception in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


def _beside(
    case: AnyCase,
    job: str,
    name: str,
    ours: Side,
    theirs: Side,
    repeats: int,
    device: Device,
    limit_s: float | None = None,
) -> Row:
    ours.prepare()
    limit_s = limit_s or device.limit_s or (CPU_LIMIT_S if isinstance(case, TrainingCase) else None)
    time, host, pairs = _timed(ours.call, theirs.call, repeats, device, limit_s, theirs.restore)
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
        time=time,
        pairs=pairs,
        difference=_checked(case, job, name, ours, theirs),
        bytes_moved=case.bytes_moved(job),
        host=host if device.kind == CUDA else None,
        remark=theirs.remark,
    )
    if device.kind != CUDA:
        return row
    if isinstance(case, TrainingCase):
        first, second = (partial(_step_us, case.loop_steps, side.call, device) for side in (ours, theirs))
        row = replace(row, loop=Comparison.of(interleaved(first, second, repeats, device.limit_s)))
    else:
        row = _with_replays(row, ours, theirs, repeats, device)
    if row.replay is None or row.replay.peer is not None:  # else nexus has gone further than its peer
        row = replace(row, difference=_checked(case, job, name, ours, theirs))
    return row


def _timed(
    first: Call,
    second: Call,
    repeats: int,
    device: Device,
    limit_s: float | None,
    restore: Call = lambda: None,
) -> tuple[Comparison, Comparison, int]:
    """Times of the device and of the host, and of how many pairs. Before each second call is `restore`, not timed."""

    def second_sample() -> Sample:
        restore()
        return device.sample(second)

    pairs: list[tuple[Sample, Sample]] = interleaved(partial(device.sample, first), second_sample, repeats, limit_s)
    times, host_times = [(a.us, b.us) for a, b in pairs], [(a.host_us, b.host_us) for a, b in pairs]
    return Comparison.of(times), Comparison.of(host_times), len(pairs)


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
    replays: list[Call | None] = []
    for side, who in ((ours, "nexus"), (theirs, "the peer")):
        try:
            replays.append(_captured(side, device))
        except Exception as error:
            remark = f"{who} was not captured: {described(error)}"
            row = replace(row, remark="; ".join(filter(None, (row.remark, remark))))
            replays.append(None)
        if replays[0] is None:
            return row
    first, second = replays
    assert first is not None
    time, host, _ = _timed(first, second or (lambda: None), repeats, device, device.limit_s)
    if second is None:
        time, host = (replace(times, peer=None, ratio=None) for times in (time, host))
    return replace(row, replay=time, replay_host=host)


def _captured(side: Side, device: Device) -> Call | None:
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


def _step_us(steps: int, call: Call, device: Device) -> float:
    """What a step takes of several that are enqueued in a row, until the device has done the last."""

    def loop() -> None:
        for _ in range(steps):
            call()
        device.wait()

    device.wait()
    return microseconds(loop) / steps
