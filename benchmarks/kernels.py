"""What each kernel of a step takes on a GPU, beside a copy that moves as many bytes as the step: `--case kernels`.

torch's profiler tells the kernels apart. It stays attached to the process, whose later launches may take longer: so
this is not timed unless it is asked for, and then last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks import contestants
from benchmarks.cases import CASES, CLIP_STEP_SCHEDULE, COPY, NORM, PROLOGUE, STEP, UPDATE, Case
from benchmarks.gpu_checks import ON_GPU
from benchmarks.measure import described
from benchmarks.report import KernelRow, LeftOut, Spread
from benchmarks.timing import Device
from nexus import backends

KERNELS = "kernels"
WORDS = {  # in the names of kernels, of CUDA and of Triton
    "sum_squares": NORM,
    "norm": NORM,
    "prepare": PROLOGUE,
    "prologue": PROLOGUE,
    "update": UPDATE,
    "Memcpy DtoD": COPY,
    "copy_kernel": COPY,
}
TAKEN_APART = ("billion", "billion-bf16", "many", "ten", "ten-thousand")
REPEATS, QUICK_REPEATS, WARMUP = 30, 5, 3

Launches = Sequence[tuple[str, float]]


def measure_kernels(
    repeats: int, device: Device, names: Sequence[str] = TAKEN_APART, wanted: Sequence[str] = ON_GPU
) -> Iterator[KernelRow | LeftOut]:
    """Take `repeats` steps of each case apart, of each of the wanted backends that runs here."""
    available = [info.name for info in backends.describe() if info.name in wanted and info.available]
    for case in (CASES[name] for name in names):
        for backend in available:
            yield _row_or_reason(case, backend, repeats, device)
            device.settle()


def _row_or_reason(case: Case, backend: str, repeats: int, device: Device) -> KernelRow | LeftOut:
    left_out = partial(LeftOut, case.name, KERNELS, backend)
    too_large = device.lacks(case.bytes_needed(device.kind))
    if too_large is not None:
        return left_out(too_large, failed=False)
    try:
        step = contestants.nexus(case, CLIP_STEP_SCHEDULE, device, backend).call
        copy = contestants.copy(case, CLIP_STEP_SCHEDULE, device)

        def step_and_copy() -> None:
            step()
            copy()

        for _ in range(WARMUP):
            step_and_copy()
        device.wait()
    except Exception as error:
        return left_out(described(error), failed=True)
    try:
        launches = device.kernels(step_and_copy, repeats)
        times, others = by_part(launches, repeats)
    except Exception as error:  # of the profiler, without which the rest of the benchmark does
        return left_out(f"the profiler does not tell kernels apart: {described(error)}", failed=False)
    return KernelRow(
        case=case.name,
        title=case.title,
        dtype=case.dtype,
        tensors=len(case.shapes),
        elements=case.elements,
        backend=backend,
        steps=repeats,
        times={part: Spread.of(values) for part, values in times.items()},
        shares=_shares(case, times),
        others=others,
    )


def by_part(launches: Launches, steps: int) -> tuple[dict[str, list[float]], list[str]]:
    """Microseconds of each part in each of the steps, and the names of kernels that belong to none.

    Raises:
        RuntimeError: a part was not seen equally often in each step.
    """
    seen: dict[str, list[float]] = {part: [] for part in WORDS.values()}
    others = set()
    for name, us in launches:
        part = next((part for word, part in WORDS.items() if word in name), None)
        if part is None:
            others.add(name)
        else:
            seen[part].append(us)
    for part, values in seen.items():
        if not values or len(values) % steps:
            raise RuntimeError(f"{part} was seen {len(values)} times in {steps} steps")
    sums = {part: [sum(each) for each in _chunks(values, steps)] for part, values in seen.items()}
    return sums, sorted(others)


def _chunks(values: list[float], count: int) -> Iterator[list[float]]:
    size = len(values) // count
    return (values[i : i + size] for i in range(0, len(values), size))


def _shares(case: Case, times: dict[str, list[float]]) -> dict[str, Spread]:
    """The speed of what moves much, as shares of the speed of the copy next to it."""
    whole, update = case.bytes_moved(CLIP_STEP_SCHEDULE), case.bytes_moved(STEP)
    every = [sum(parts) for parts in zip(times[NORM], times[PROLOGUE], times[UPDATE], strict=True)]
    moved = {NORM: (times[NORM], whole - update), UPDATE: (times[UPDATE], update), STEP: (every, whole)}
    return {
        what: Spread.of([copy / us * count / whole for copy, us in zip(times[COPY], taken, strict=True)])
        for what, (taken, count) in moved.items()
    }
