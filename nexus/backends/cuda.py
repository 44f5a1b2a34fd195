"""The CUDA backend: norm, prologue and one update over all tensors of a device, enqueued on the caller's stream."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus.backends.extension import extension
from nexus.backends.extension import unavailable as why_no_extension
from nexus.backends.interface import DevicePlan, Plan, Runner
from nexus.backends.records import address, layout, state_values
from nexus.backends.watched import WatchedRunner, as_float32, make_records

__all__ = ["DEVICE_TYPES", "NAME", "CudaRunner", "detail", "evaluate", "runner", "unavailable"]

NAME = "cuda"
DEVICE_TYPES = frozenset({"cuda"})


def unavailable(devices: Iterable[torch.device] = ()) -> str | None:
    """Why it cannot run here, or on one of `devices`, by default the current: no code, no GPU, an older GPU."""
    reason = why_no_extension()
    if reason is not None:
        return reason
    if not has_code():
        failure = Path(__file__).parents[1] / "_native_cuda_failure.txt"
        why = failure.read_text().strip() if failure.is_file() else "it was built without NEXUS_CUDA"
        return f"the extension has no CUDA code: {why}"
    built = f"; nexus is compiled for {extension.cuda_architectures}"
    if torch.version.cuda is None:
        return f"this PyTorch is not built for CUDA{built}"
    if not torch.cuda.is_available():
        return f"PyTorch finds no CUDA device{built}"
    devices = list(devices) or [torch.device("cuda")]
    indices = {torch.cuda.current_device() if device.index is None else device.index for device in devices}
    return next(filter(None, map(_unavailable_on, sorted(indices))), None)


def has_code() -> bool:
    """Whether the extension was built with the CUDA kernels."""
    return hasattr(extension, "CudaRecords")


@functools.cache
def _unavailable_on(index: int) -> str | None:
    error = extension.cuda_missing_code(index)
    if not error:
        return None
    if "InsufficientDriver" in error:
        return (
            f"the driver is older than the CUDA that the extension was built with: {error}. Update the driver, or "
            f"install nexus again with the nvcc of CUDA {torch.version.cuda}"
        )
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"the extension has code for {extension.cuda_architectures} and newer, none for cuda:{index} "
        f"({torch.cuda.get_device_name(index)}, sm_{major}{minor}): {error}. Install nexus again with "
        f"NEXUS_CUDA_ARCHS=sm_{major}{minor}"
    )


def detail() -> str:
    """The GPUs, and what the extension was compiled for, in words."""
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    return f"{', '.join(names)}; compiled for {extension.cuda_architectures}"


def runner(setting_names: tuple[str, ...]) -> CudaRunner:
    """One for an optimizer."""
    release = torch._C._cuda_cudaCachingAllocator_raw_delete
    return CudaRunner(make_records(functools.partial(extension.CudaRecords, allocate, release), setting_names))


def allocate(device: int, nbytes: int, stream: int) -> int:
    """The address of memory for what a step reads, of torch's allocator, which frees what it can where a GPU is full.

    Raises:
        torch.cuda.OutOfMemoryError: there is not enough.
    """
    try:
        address: int = torch.cuda.caching_allocator_alloc(nbytes, device, stream)
    except torch.cuda.OutOfMemoryError as error:
        raise torch.cuda.OutOfMemoryError(
            f"{error} (FusedAdamW asked for {nbytes} bytes on cuda:{device}, for the table of the tensors that it "
            "updates. Nothing has changed on this GPU; the next step asks again.)"
        ) from error
    return address


def evaluate(table: Tensor, steps: Tensor) -> Tensor:
    """A schedule's values at `steps`, by the function that the prologue of a step calls."""
    steps = steps.contiguous()
    out = torch.empty(steps.shape, dtype=torch.float64, device=steps.device)
    index, stream = current_stream(steps.device)
    layers, rows, _ = table.shape
    extension.cuda_evaluate(
        index, table.data_ptr(), layers, rows, steps.data_ptr(), steps.numel(), out.data_ptr(), stream
    )
    return out


def current_stream(device: torch.device) -> tuple[int, int]:
    """The index of a device, and the address of the stream that the caller is on there."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


class CudaRunner(WatchedRunner):
    """Runs steps on the GPUs on which the tensors are."""

    current_stream = staticmethod(current_stream)
    shares_prologue = True

    def __init__(self, records: Any) -> None:
        super().__init__(records)
        self._devices: list[DevicePlan] = []
        self._places: dict[Tensor, tuple[int, int]] = {}  # of each parameter: its device, and where it is there

    def has_captured(self) -> bool:
        return bool(self.records.has_captured())

    def update_captured(self) -> None:
        super().update_captured()
        for position, plan in enumerate(self._devices):
            self.records.update_captured(position, self.current_stream(plan.state.device)[1])

    def prologue(self) -> None:
        self._bring_rates()
        try:
            for position, plan in enumerate(self._devices):
                self.records.prologue(position, self.current_stream(plan.state.device)[1])
        finally:
            self.records.release_gradients()

    def take_prologue(self, other: Runner | None, param: Tensor) -> None:
        if self._plan is None:
            return
        prepared = 0, 0
        if isinstance(other, CudaRunner) and param in other._places:
            prepared = other.records.prepared(*other._places[param], self.current_stream(param.device)[1])
        self.records.take(*prepared)

    def _take_tensors(self, plan: Plan) -> None:
        self._devices = list(plan.devices.values())
        self._places = {
            entry.original: (position, index)
            for position, device in enumerate(self._devices)
            for index, entry in enumerate(device.entries)
        }
        self.records.divide(
            [
                (self.current_stream(device.state.device)[0], len(device.entries), len(device.groups))
                for device in self._devices
            ]
        )
        self._take_settings(plan)

    def _take_settings(self, plan: Plan) -> None:
        for position, device_plan in enumerate(self._devices):
            self.records.fill_state(position, layout("StepState").pack(state_values(device_plan)))

    def _measure(self) -> None:
        for position, plan in enumerate(self._devices):
            if plan.measures_norm:
                stream = self.current_stream(plan.state.device)[1]
                self.records.sum_of_squares(position, plan.state.sum_of_squares.data_ptr(), stream)

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for position, plan in enumerate(self._devices):
            device = plan.state.device
            scale, inf = as_float32(grad_scale, device), as_float32(found_inf, device)
            self.records.step(position, address(scale), address(inf), self.current_stream(device)[1])
        self.records.release_gradients()
