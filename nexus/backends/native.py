"""The compiled backend: one parallel region over all tensors on the CPU, in the best instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus.backends.extension import extension, unavailable
from nexus.backends.interface import Plan
from nexus.backends.records import address, layout, state_values
from nexus.backends.watched import WatchedRunner, as_float32, make_records

__all__ = ["DEVICE_TYPES", "NAME", "NativeRunner", "detail", "evaluate", "runner", "unavailable"]

NAME = "native"
DEVICE_TYPES = frozenset({"cpu"})
_CPU = torch.device("cpu")


def detail() -> str:
    """Instruction sets and threads, in words."""
    sets = ", ".join(extension.instruction_sets())
    return f"CPU ({sets}), {torch.get_num_threads()} threads of {extension.thread_runtime()}"


def runner(setting_names: tuple[str, ...]) -> NativeRunner:
    """One for an optimizer."""
    return NativeRunner(make_records(extension.CpuRecords, setting_names))


def evaluate(table: Tensor, steps: Tensor) -> Tensor:
    """A schedule's values at `steps`, by the function that the update kernels call."""
    steps = steps.contiguous()
    out = torch.empty(steps.shape, dtype=torch.float64, device=_CPU)
    layers, rows, _ = table.shape
    extension.evaluate(table.data_ptr(), layers, rows, steps.data_ptr(), steps.numel(), out.data_ptr())
    return out


class NativeRunner(WatchedRunner):
    """Runs steps on the CPU."""

    def _take_tensors(self, plan: Plan) -> None:
        self.records.divide()
        self._take_settings(plan)

    def _take_settings(self, plan: Plan) -> None:
        self.records.fill_state(layout("StepState").pack(state_values(plan.devices[_CPU])))

    def _measure(self) -> None:
        for total in self._sums:
            self.records.sum_of_squares(total.data_ptr(), torch.get_num_threads())

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        scale, inf = as_float32(grad_scale, _CPU), as_float32(found_inf, _CPU)
        self.records.step(torch.get_num_threads(), address(scale), address(inf))
