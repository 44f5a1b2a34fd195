"""Sets whole training steps with nexus beside torch's loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import trainees
from benchmarks.cases import CUDA
from benchmarks.measure import CPU_DEVICE, Disagreement, PeerFailure, described, guarded
from benchmarks.rows import Comparison, LeftOut, Row
from benchmarks.timing import Device, interleaved, microseconds
from benchmarks.trainees import Trainee
from benchmarks.training_cases import PEERS, TrainingCase

CPU_LIMIT_S = 8.0  # of a comparison; a busy machine makes the many small operations of a step very slow
CHECKED_STEPS = 20
TOLERANCE, TOLERANCE_AUTOCAST = 5e-3, 5e-2
"""Of the difference between two loops' losses in the first steps, as a share of the way that the loss goes. Rounding
is a tenth of that or less."""


def measure_training(case: TrainingCase, repeats: int, device: Device = CPU_DEVICE) -> Iterator[Row | LeftOut]:
    """Time a case: every job, beside every peer, at most `repeats` pairs each.

    Whatever one of them ends in, the others go on.
    """
    for job in case.jobs_on(device.kind):
        for name in PEERS[device.kind, job]:
            yield guarded(partial(_beside, case, job, name, repeats, device), case.name, job, name)
            device.settle()


def _beside(case: TrainingCase, job: str, name: str, repeats: int, device: Device) -> Row:
    ours = trainees.nexus(case, job, device)
    theirs = _peer(case, job, name, device)
    difference = _checked(case, job, name, ours, theirs)
    first, second = partial(device.sample, ours.call), partial(device.sample, theirs.call)
    pairs = interleaved(first, second, repeats, device.limit_s or CPU_LIMIT_S)
    parameters = list(ours.model.parameters())
    row = Row(
        case=case.name,
        title=case.title,
        device=device.kind,
        dtype="float32, autocast to bfloat16" if case.autocast else "float32",
        tensors=len(parameters),
        elements=sum(parameter.numel() for parameter in parameters),
        groups=1,
        job=job,
        peer=name,
        backend=ours.backend,
        time=Comparison.of([(a.us, b.us) for a, b in pairs]),
        pairs=len(pairs),
        difference=difference,
        bytes_moved=None,
        host=Comparison.of([(a.host_us, b.host_us) for a, b in pairs]) if device.kind == CUDA else None,
        loop=_loop(case, ours, theirs, repeats, device) if device.kind == CUDA else None,
    )
    if not math.isfinite(float(ours.call())):
        raise Disagreement(f"{case.name}, {job}: the loss is no longer finite")
    return row


def _peer(case: TrainingCase, job: str, name: str, device: Device) -> Trainee:
    """One that has taken its first steps, which tells a peer's own failures from those of nexus."""
    try:
        theirs = trainees.peer(case, job, name, device)
        theirs.read_losses(CHECKED_STEPS)
    except Exception as error:
        raise PeerFailure(described(error)) from error
    return theirs


def _checked(case: TrainingCase, job: str, name: str, ours: Trainee, theirs: Trainee) -> float:
    """How far the losses of the first steps are apart, as a share of the way that the peer's goes."""
    a, b = ours.read_losses(CHECKED_STEPS), theirs.read_losses(CHECKED_STEPS)
    way = max(b) - min(b)
    difference = max(abs(x - y) for x, y in zip(a, b, strict=True)) / way if way else math.inf
    if not difference < (TOLERANCE_AUTOCAST if case.autocast else TOLERANCE):
        raise Disagreement(
            f"{case.name}, {job}: the losses of nexus and of its peer ({name}) differ by {difference:.1e} of the way "
            "that they went"
        )
    return difference


def _loop(case: TrainingCase, ours: Trainee, theirs: Trainee, repeats: int, device: Device) -> Comparison:
    """What a step takes of several that are enqueued in a row, until the device has done the last."""
    first, second = (partial(_step_us, case, side.call, device) for side in (ours, theirs))
    return Comparison.of(interleaved(first, second, repeats, device.limit_s))


def _step_us(case: TrainingCase, call: Callable[[], object], device: Device) -> float:
    def loop() -> None:
        for _ in range(case.loop_steps):
            call()
        device.wait()

    device.wait()
    return microseconds(loop) / case.loop_steps
