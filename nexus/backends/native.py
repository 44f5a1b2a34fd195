"""The compiled backend: one parallel region over all tensors on the CPU, in the best instruction set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus.backends.extension import extension, unavailable
from nexus.backends.interface import Plan
from nexus.backends.records import address, layout, state_values
from nexus.backends.sharding import total_everywhere
from nexus.backends.watched import WatchedRunner, make_list

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
    return NativeRunner(make_list(extension.CpuRecords, setting_names))


def evaluate(table: Tensor, steps: Tensor) -> Tensor:
    """A schedule's values at `steps`, by the function that the update kernels call."""
    steps = steps.contiguous()
    out = torch.empty(steps.shape, dtype=torch.float64, device=_CPU)
    extension.evaluate(table.data_ptr(), table.shape[0], steps.data_ptr(), steps.numel(), out.data_ptr())
    return out


class NativeRunner(WatchedRunner):
    """Runs a list on the CPU."""

    name = NAME

    def __init__(self, tensors: Any) -> None:
        super().__init__(tensors)
        self._measures_norm = False
        self._sum_of_squares = 0

    def _take_tensors(self, plan: Plan) -> None:
        self._list.divide()
        self._take_settings(plan)

    def _take_settings(self, plan: Plan) -> None:
        device_plan = plan.devices[_CPU]
        self._measures_norm = device_plan.measures_norm
        self._sum_of_squares = device_plan.state.sum_of_squares.data_ptr()
        self._list.fill_state(layout("StepState").pack(state_values(device_plan)))

    def _run(self, plan: Plan, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        threads = torch.get_num_threads()
        if self._measures_norm:
            self._list.sum_of_squares(self._sum_of_squares, threads)
        if plan.norm_parts:
            sums = [plan.devices[_CPU].state.sum_of_squares] if self._measures_norm else []
            found_inf = total_everywhere(sums, plan.norm_parts, found_inf)
        if grad_scale is None and found_inf is None:
            self._list.step(threads, 0, 0)
        else:
            scale, inf = _float32(grad_scale), _float32(found_inf)
            self._list.step(threads, address(scale), address(inf))


def _float32(scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.to(_CPU, torch.float32)
