"""The Triton backend: for GPUs without the compiled CUDA kernels, and for AMD's.

Its kernels also run on the CPU where the environment has `TRITON_INTERPRET=1`: slowly, and for tests alone.
Neither `triton` nor a kernel is imported before the first use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor

from nexus.backends.extension import extension
from nexus.backends.extension import unavailable as why_no_extension
from nexus.backends.interface import DevicePlan, Plan, Runner
from nexus.backends.records import address, state_values
from nexus.backends.triton_tables import (
    CHUNK_ELEMENTS,
    COEFFICIENTS,
    CapturedStep,
    DeviceTable,
    chunk_words,
    dtypes_of,
    is_capturing,
    kind_of,
    put_kinds,
    update_captured,
    words,
)
from nexus.backends.watched import WatchedRunner, as_float32, make_records

__all__ = ["DEVICE_TYPES", "NAME", "TritonRunner", "detail", "evaluate", "runner", "unavailable"]

NAME = "triton"
INTERPRETS = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
DEVICE_TYPES = frozenset({"cpu"} if INTERPRETS else {"cuda"})

_THREADS = 4 * (64 if torch.version.hip else 32)  # of one program: four warps, which AMD's GPUs have wider
_LANES = 1024 if INTERPRETS else 128  # tensors, groups or steps that one program evaluates the rates of
_SUMS = 1024  # sums of chunks that are added up at once
_loaded: set[tuple[Any, ...]] = set()  # kernels that have been launched
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # of every launch; fusion would round otherwise


def unavailable(devices: Iterable[torch.device] = ()) -> str | None:
    """Why Triton cannot run here."""
    if (reason := why_no_extension()) is not None:
        return reason
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run 'pip install triton'"
    if not INTERPRETS and not torch.cuda.is_available():
        return "there is no GPU; TRITON_INTERPRET=1 in the environment runs it on the CPU, slowly, to try it out"
    return None


def detail() -> str:
    """Version and device, in words."""
    from importlib.metadata import version

    where = "its interpreter on the CPU" if INTERPRETS else torch.cuda.get_device_name()
    return f"Triton {version('triton')}, {where}"


def runner(setting_names: tuple[str, ...]) -> TritonRunner:
    """One for an optimizer."""
    return TritonRunner(make_records(extension.WatchedRecords, setting_names))


def evaluate(table: Tensor, steps: Tensor) -> Tensor:
    """A schedule's values at `steps`, by the function that the prologue of an update calls."""
    steps = steps.contiguous()
    out = torch.empty(steps.shape, dtype=torch.float64, device=steps.device)
    count = steps.numel()
    if count:
        with _launching(steps.device) as kernels:
            grid = (_ceil_div(count, _LANES),)
            kernels.evaluate[grid](table, table.shape[0], table.shape[1], steps, count, out, BLOCK=_LANES, **OPTIONS)
    return out


def block_elements(param: torch.dtype, grad: torch.dtype) -> int:
    """Elements of a tensor that a program updates at once: for each thread, 128 bits of a parameter or gradient.

    They are whole blocks of a scale.
    """
    if INTERPRETS:
        return CHUNK_ELEMENTS  # there, an operation costs the same at any size
    if param == torch.float64:
        return 2 * _THREADS  # more, for the sake of a narrow gradient, would take too many registers
    return 16 // min(param.itemsize, grad.itemsize) * _THREADS


@contextlib.contextmanager
def _launching(device: torch.device) -> Iterator[Any]:
    """Give the kernels, to be launched on the current stream of `device`."""
    from nexus.backends import triton_kernels

    if INTERPRETS:
        import numpy

        with numpy.errstate(all="ignore"):  # in floating point, infinity and NaN are values
            yield triton_kernels
    else:
        with torch.cuda.device(device):
            yield triton_kernels


def _stream(device: torch.device) -> int:
    """The address of the stream that the caller is on."""
    return 0 if device.type == "cpu" else int(torch.cuda.current_stream(device).cuda_stream)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


Prepared: TypeAlias = tuple[Tensor, Tensor]
"""What a prologue has left for the update of one tensor: its coefficients, and whether to skip."""


class _DeviceStep:
    """What is updated on one device: its tables, and the launches over them.

    Args:
        plan: of that device.
        last: what this one takes the place of, and whose device memory it takes over where it fits.
    """

    def __init__(self, plan: DevicePlan, last: _DeviceStep | None) -> None:
        device = plan.state.device
        entries = plan.entries
        self.plan = plan
        self.sizes = tuple(entry.param.numel() for entry in entries)
        kinds = [kind_of(entry, block_elements(*dtypes_of(entry))) for entry in entries]
        self._kinds = tuple(sorted(set(kinds)))
        self._kind_indices = [self._kinds.index(kind) for kind in kinds]
        self._history = tuple(value for name, value in state_values(plan).items() if name.startswith("history."))
        self._chunks = chunk_words(self.sizes or (0,))
        self._table: DeviceTable = DeviceTable(device) if last is None else last._table
        self._group_table: DeviceTable = DeviceTable(device) if last is None else last._group_table
        self._chunk_table = DeviceTable(device, fixed=True)
        if last is not None and last.sizes == self.sizes:
            self._chunk_table = last._chunk_table
        self._skip = torch.empty((), dtype=torch.int64, device=device)
        shape = max(len(entries), 1), len(COEFFICIENTS)
        self._coefficients = torch.empty(shape, dtype=torch.float64, device=device)
        self._partial_sums = torch.zeros(len(self._chunks), dtype=torch.float64, device=device)
        self._prepared_on: int | None = None  # the stream of a prologue() whose rates still hold
        self._measured: bool | None = None  # whether the last step here, if there was one, measured the norm

    def follow(self, records: Tensor, groups: Tensor) -> CapturedStep | None:
        """Take over the records of this device's tensors and groups, and upload what has changed.

        Returns:
            The step, if it becomes part of a graph.

        Raises:
            RuntimeError: it is captured, and its kernels are not there yet.
        """
        capturing = is_capturing(self.plan.state.device)
        if capturing and not self._kernels() <= _loaded:
            raise RuntimeError(
                "this would be the first step of its kind, and Triton loads kernels at their first launch, which no "
                "capture allows: make a step before the capture"
            )
        put_kinds(records, self._kind_indices)
        if not len(records):  # there is an empty chunk of a record of zeros
            records = records.new_zeros(1, records.shape[1])
        self._group_count = len(groups)
        group_table = self._group_table.upload(groups.flatten(), capturing=capturing)
        record_table = self._table.upload(records.flatten(), capturing=capturing)
        chunk_table = self._chunk_table.upload(self._chunks.flatten(), capturing=capturing)
        self._on_device = group_table.memory, record_table.memory, chunk_table.memory
        if not capturing:
            return None
        memory = record_table, chunk_table, self._skip, self._coefficients, self._partial_sums
        return CapturedStep(group_table, self.plan.measures_norm, memory)

    def upload_groups(self, groups: Tensor) -> None:
        """Upload hyperparameters, unless that would become part of a graph."""
        if not is_capturing(self.plan.state.device):
            self._group_table.upload(groups.flatten(), capturing=False)

    def measure(self) -> None:
        """Leave the sum of squares of this device's gradients in its state."""
        _, records, chunks = self._on_device
        sums = self._partial_sums
        with _launching(self.plan.state.device) as kernels:
            kernels.norm[len(sums),](chunks, records, sums, KINDS=self._kinds, **OPTIONS)
            kernels.norm_total[1,](sums, len(sums), self.plan.state.sum_of_squares, BLOCK=_SUMS, **OPTIONS)

    def prologue(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Decide whether to skip, and evaluate the rates; gradients need not be there yet."""
        state, (groups, records, _) = self.plan.state, self._on_device
        scale, inf = as_float32(grad_scale, state.device), as_float32(found_inf, state.device)
        with _launching(state.device) as kernels:
            kernels.prologue[1 + _ceil_div(len(self._coefficients), _LANES),](
                groups,
                self._group_count,
                records,
                len(self._coefficients),
                self._coefficients,
                self._skip,
                state.completed,
                state.sum_of_squares,
                state.grad_norm,
                address(scale),
                address(inf),
                int(self.plan.measures_norm),
                int(state.skip_nonfinite),
                *self._history,
                BLOCK=_LANES,
                **OPTIONS,
            )
        self._prepared_on = _stream(state.device)

    def prepared(self, tensor: int) -> Prepared | None:
        """What prologue() has left of a tensor, for an update on the current stream."""
        if self._prepared_on is None or self._prepared_on != _stream(self.plan.state.device):
            return None
        return self._coefficients[tensor:], self._skip

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None, given: Prepared | None) -> None:
        """Update every tensor, its counter, and the counters of the step; by what is given in place of a prologue."""
        state, (_, records, chunks) = self.plan.state, self._on_device
        if given is None:
            self.prologue(grad_scale, found_inf)
        self._prepared_on = None
        coefficients, skip = (self._coefficients, self._skip) if given is None else given
        with _launching(state.device) as kernels:
            kernels.update[len(self._chunks),](
                chunks,
                records,
                coefficients,
                skip,
                state.completed,
                state.skipped,
                int(self.plan.advances),
                self._history[0],
                state.seed,
                KINDS=self._kinds,
                **OPTIONS,
            )
        if self._measured != self.plan.measures_norm:
            self._measured = self.plan.measures_norm
            _loaded.update(self._kernels())

    def _kernels(self) -> set[tuple[Any, ...]]:
        """What of the kernels of a step is compiled for it alone."""
        names = ("norm", "update") if self.plan.measures_norm else ("update",)
        return {(name, self._kinds, self.plan.state.device) for name in names}


class TritonRunner(WatchedRunner):
    """Launches the kernels over the tables of each device."""

    shares_prologue = True

    def __init__(self, records: Any) -> None:
        super().__init__(records)
        self._devices: dict[torch.device, _DeviceStep] = {}
        self._places: dict[Tensor, tuple[_DeviceStep, int]] = {}  # of each parameter, and where it is there
        self._given: Prepared | None = None
        self._captured: WeakSet[CapturedStep] = WeakSet()
        self._kept: list[object] = []  # those in graphs that may live as long as the runner

    def _take_tensors(self, plan: Plan) -> None:
        last = self._devices
        self._devices = {device: _DeviceStep(own, last.get(device)) for device, own in plan.devices.items()}
        self._places = {
            entry.original: (device, index)
            for device in self._devices.values()
            for index, entry in enumerate(device.plan.entries)
        }

    def _take_settings(self, plan: Plan) -> None:
        """They are in the records of each step."""

    def has_captured(self) -> bool:
        return len(self._captured) > 0

    def update_captured(self) -> None:
        super().update_captured()
        devices = list(self._devices.values())
        for device, groups in zip(devices, self._groups_of(devices), strict=True):
            steps = [step for step in self._captured if step.groups.memory.device == device.plan.state.device]
            update_captured(steps, groups.flatten(), measures_norm=device.plan.measures_norm)
            device.upload_groups(groups)  # also to a step that is captured next

    @contextlib.contextmanager
    def capturing(self) -> Iterator[list[object]]:
        devices = list(self._devices.values())
        for device, groups in zip(devices, self._groups_of(devices), strict=True):
            device.upload_groups(groups)  # which no replay has to write then
        kept, self._kept = self._kept, []
        try:
            yield self._kept
        finally:
            self._kept = kept

    def _groups_of(self, devices: list[_DeviceStep]) -> tuple[Tensor, ...]:
        return words(self.records.groups(), "Group", [len(own.plan.groups) for own in devices])

    def prologue(self) -> None:
        self._bring_rates()
        try:
            self._follow()
            for device in self._devices.values():
                device.prologue()
        finally:
            self.records.release_gradients()

    def take_prologue(self, other: Runner | None, param: Tensor) -> None:
        self._given = None
        if isinstance(other, TritonRunner) and param in other._places:
            device, index = other._places[param]
            self._given = device.prepared(index)

    def _follow(self) -> None:
        devices = list(self._devices.values())
        records = words(self.records.tensors(), "TensorRecord", [len(own.sizes) for own in devices])
        for device, own_records, groups in zip(devices, records, self._groups_of(devices), strict=True):
            captured = device.follow(own_records, groups)
            if captured is not None:
                self._captured.add(captured)
                self._kept.append(captured)

    def _run(self, plan: Plan, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._follow()
        super()._run(plan, grad_scale, found_inf)

    def _measure(self) -> None:
        for device in self._devices.values():
            if device.plan.measures_norm:
                device.measure()

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for device in self._devices.values():
            device.update(grad_scale, found_inf, self._given)
        self._given = None
        self.records.release_gradients()
