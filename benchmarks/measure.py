"""Sets nexus beside each peer, and says how many times as fast one is as the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from benchmarks import contestants, peers
from benchmarks.cases import BFLOAT16, COPY, CUDA, FLOAT32, STEP, Case
from benchmarks.contestants import Contestant
from benchmarks.rows import Comparison, LeftOut, Row
from benchmarks.timing import Cpu, Device, Sample, interleaved

CPU_DEVICE = Cpu()
TOLERANCE = {FLOAT32: 5e-3, BFLOAT16: 0.1}
"""Of `contestants.difference`. In float32, rounding of parameters that go a short way is a tenth of that. In
bfloat16, where peers' moments are of that type too, they were seen to differ by up to 0.035 in 200 steps."""
BFLOAT16_REPEATS = 30
"""At most: 150 steps. From step 256 on a bfloat16 second moment grows no more, and the two sides part."""


class Disagreement(Exception):
    """Two optimizers that were timed have not done the same."""


class PeerFailure(Exception):
    """The other side cannot do the job here."""


def measure(case: Case, repeats: int, device: Device = CPU_DEVICE) -> Iterator[Row | LeftOut]:
    """Time a case: every job, beside every peer, at most `repeats` pairs each.

    Whatever one of them ends in, the others go on.
    """
    repeats = min(repeats, BFLOAT16_REPEATS) if case.dtype == BFLOAT16 else repeats
    for job in case.jobs:
        for name in case.peers_on(device.kind):
            reason = peers.unavailable(name)
            if reason is None:
                yield guarded(partial(_beside_peer, case, job, name, repeats, device), case.name, job, name)
                device.settle()
            else:
                yield LeftOut(case.name, job, name, reason, failed=False)
        if case.memory_bound and job == STEP:
            yield guarded(partial(_beside_copy, case, job, repeats, device), case.name, job, COPY)
            device.settle()


def guarded(compare: Callable[[], Row], case: str, job: str, peer: str) -> Row | LeftOut:
    """What `compare` measures, or why it does not."""
    try:
        return compare()
    except PeerFailure as error:
        return LeftOut(case, job, peer, str(error), failed=False)
    except Disagreement as error:
        return LeftOut(case, job, peer, str(error), failed=True)
    except Exception as error:  # of whatever kind: kernels are compiled and run here that nobody may have run before
        return LeftOut(case, job, peer, described(error), failed=True)


def described(error: Exception) -> str:
    """An exception in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


def _beside_peer(case: Case, job: str, name: str, repeats: int, device: Device) -> Row:
    ours = contestants.nexus(case, job, device.where)
    theirs = _peer(case, job, name, device)
    ours.call()
    pairs = _timed(ours.call, theirs.call, repeats, device)
    row = replace(_row(case, job, name, ours, device, pairs), difference=_checked(case, job, name, ours, theirs))
    row = _with_replays(row, ours, theirs, repeats, device)
    if row.replay is not None and row.replay.peer is not None:
        row = replace(row, difference=_checked(case, job, name, ours, theirs))
    return replace(row, remark="; ".join(filter(None, (theirs.remark, row.remark))))


def _peer(case: Case, job: str, name: str, device: Device) -> Contestant:
    """One that has taken its first step, which tells a peer's own failures from those of nexus."""
    try:
        theirs = contestants.peer(case, job, name, device.where)
        theirs.call()
        device.wait()
    except Exception as error:
        raise PeerFailure(described(error)) from error
    return theirs


def _timed(
    first: Callable[[], object], second: Callable[[], object], repeats: int, device: Device
) -> list[tuple[Sample, Sample]]:
    return interleaved(partial(device.sample, first), partial(device.sample, second), repeats, device.limit_s)


def _checked(case: Case, job: str, name: str, ours: Contestant, theirs: Contestant) -> float:
    difference = contestants.difference(ours, theirs)
    if not difference < TOLERANCE[case.dtype]:
        raise Disagreement(
            f"{case.name}, {job}: the parameters of nexus and of its peer ({name}) differ by {difference:.1e} of "
            "the way that they went"
        )
    return difference


def _with_replays(row: Row, ours: Contestant, theirs: Contestant, repeats: int, device: Device) -> Row:
    """With replays of both in turns, or of nexus alone; why one was not captured is a remark."""
    try:
        first = _captured(ours, device)
    except Exception as error:
        return replace(row, remark=f"nexus was not captured: {described(error)}")
    if first is None:
        return row
    try:
        second = _captured(theirs, device)
    except Exception as error:
        second, row = None, replace(row, remark=f"the peer was not captured: {described(error)}")
    pairs = _timed(first, second or _nothing, repeats, device)
    device_times = Comparison.of([(a.us, b.us) for a, b in pairs])
    host_times = Comparison.of([(a.host_us, b.host_us) for a, b in pairs])
    if second is None:
        device_times, host_times = (replace(times, peer=None, ratio=None) for times in (device_times, host_times))
    return replace(row, replay=device_times, replay_host=host_times)


def _captured(side: Contestant, device: Device) -> Callable[[], object] | None:
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


def _beside_copy(case: Case, job: str, repeats: int, device: Device) -> Row:
    ours, copy = contestants.nexus(case, job, device.where), contestants.copy(case, job, device.where)
    return _row(case, job, COPY, ours, device, _timed(ours.call, copy, repeats, device))


def _row(
    case: Case,
    job: str,
    peer: str,
    ours: Contestant,
    device: Device,
    pairs: list[tuple[Sample, Sample]],
) -> Row:
    return Row(
        case=case.name,
        title=case.title,
        device=device.kind,
        dtype=case.dtype,
        tensors=len(case.shapes),
        elements=case.elements,
        groups=case.groups,
        job=job,
        peer=peer,
        backend=ours.backend,
        time=Comparison.of([(a.us, b.us) for a, b in pairs]),
        pairs=len(pairs),
        difference=None,
        bytes_moved=case.bytes_moved(job),
        host=Comparison.of([(a.host_us, b.host_us) for a, b in pairs]) if device.kind == CUDA else None,
    )


def _nothing() -> None:
    pass
