"""The compiled backend: one parallel region over all tensors on the CPU, in the best instruction set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus.backends.interface import Change, DevicePlan, GroupSettings, Plan, Rate, TensorEntry

try:
    from nexus import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _import_error = str(error)

NAME = "native"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of the C++ enum
_DTYPE_INDEX = {dtype: index for index, dtype in enumerate(DTYPES)}
_CPU = torch.device("cpu")


def unavailable() -> str | None:
    """Why the extension is not there: the compiler's words, where the install wrote them down."""
    if _native is not None:
        return None
    failure = Path(__file__).parents[1] / "_native_build_failure.txt"
    if failure.is_file():
        return f"the extension was not built: {failure.read_text().strip()}"
    reason = f"the extension cannot be imported: {_import_error}"
    if (Path(__file__).parents[2] / "setup.py").is_file():
        reason += (
            ". This is nexus's source tree: run 'pip install -e .' or 'make build' in it, or leave its folder to "
            "use an installed nexus"
        )
    return reason


def detail() -> str:
    """Instruction sets and threads, in words."""
    sets = ", ".join(_native.instruction_sets())
    return f"CPU ({sets}), {torch.get_num_threads()} threads of {_native.thread_runtime()}"


def runner(attributes: dict[str, Any], setting_names: tuple[str, ...]) -> NativeRunner:
    """One whose watch sees the optimizer through its `__dict__`."""
    return NativeRunner(attributes, setting_names)


def evaluate(table: Tensor, steps: Tensor) -> Tensor:
    """A schedule's values at `steps`, by the function that the update kernels call."""
    if steps.device.type != "cpu":
        raise ValueError(f"the native backend evaluates on the CPU, got steps on {steps.device}")
    steps = steps.contiguous()
    out = torch.empty(steps.shape, dtype=torch.float64, device=_CPU)
    _native.evaluate(table.data_ptr(), table.shape[0], steps.data_ptr(), steps.numel(), out.data_ptr())
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rate_fields(rate: Rate) -> tuple[float, int, int, int, int, float, int]:
    return (
        rate.value,
        _address(rate.tensor),
        0 if rate.tensor is None else _DTYPE_INDEX[rate.tensor.dtype],
        _address(rate.table),
        0 if rate.table is None else rate.table.shape[0],
        rate.scale,
        _address(rate.last),
    )


class NativeRunner:
    """Keeps raw pointers in the extension and follows them from step to step."""

    name = NAME

    def __init__(self, attributes: dict[str, Any], setting_names: tuple[str, ...]) -> None:
        self._list = _native.CpuTensorList(
            attributes,
            setting_names,
            torch._C.TensorBase.__dict__["grad"],
            getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
            DTYPES,
        )
        self._plan: DevicePlan | None = None
        self._staged: list[TensorEntry] = []
        self._measures_norm = False
        self._sum_of_squares = 0

    def changed(self) -> int:
        return Change.TENSORS if self._plan is None else self._list.refresh()

    def bind(self, plan: Plan) -> None:
        self._plan = None  # until the end: a list that is half made is never run
        device_plan = plan.devices[_CPU]
        native = self._list
        native.begin()
        self._add_groups(device_plan.groups)
        indices: dict[int, int] = {}
        for entry in device_plan.entries:
            grad = entry.grad
            indices[id(entry)] = native.add_tensor(
                entry.param.data_ptr(),
                entry.exp_avg.data_ptr(),
                entry.exp_avg_sq.data_ptr(),
                _address(entry.max_exp_avg_sq),
                entry.step.data_ptr(),
                entry.param.numel(),
                entry.group,
                _DTYPE_INDEX[entry.param.dtype],
                _DTYPE_INDEX[entry.param.dtype if grad is None else grad.dtype],
            )
        for param, watched in plan.parameters:
            if watched is None:
                native.watch_parameter(param)
            else:
                native.watch_entry(
                    param,
                    indices[id(watched)],
                    watched.param,
                    watched.param_buffer is not None,
                    watched.grad_buffer is not None,
                    _address(watched.grad_buffer),
                )
        for tensor in _one_of_each_storage(device_plan):
            native.watch_tensor(tensor)
        first, second = native.end()
        if first >= 0:
            raise ValueError(
                f"parameters {first} and {second} (in the order of the groups, of those with a gradient) share "
                "memory, and would be updated at once by two threads; give the optimizer one tensor for both"
            )
        self._staged = [entry for entry in device_plan.entries if entry.staged]
        self._set_state(device_plan)
        if native.refresh() == Change.TENSORS:  # reads where the gradients are
            raise RuntimeError("a parameter or a gradient cannot be read where it is; please report this")
        self._plan = device_plan

    def update_settings(self) -> None:
        plan, self._plan = self._plan, None  # until the end, as in bind()
        assert plan is not None
        self._list.begin_groups()
        self._add_groups(plan.groups)
        self._set_state(plan)
        self._plan = plan

    def _set_state(self, plan: DevicePlan) -> None:
        state = plan.state
        self._measures_norm = plan.measures_norm
        self._sum_of_squares = state.sum_of_squares.data_ptr()
        self._list.set_state(
            state.completed.data_ptr(),
            state.skipped.data_ptr(),
            self._sum_of_squares if plan.measures_norm else 0,
            state.grad_norm.data_ptr(),
            state.skip_nonfinite,
        )

    def _add_groups(self, groups: list[GroupSettings]) -> None:
        for group in groups:
            for rate in (group.lr, group.weight_decay):
                for tensor in (rate.tensor, rate.last):
                    if tensor is not None:
                        self._list.watch_setting_tensor(tensor)
            self._list.add_group(
                _rate_fields(group.lr),
                _rate_fields(group.weight_decay),
                *group.betas,
                group.eps,
                group.max_grad_norm,
                group.maximize,
            )

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        threads = torch.get_num_threads()
        for entry in self._staged:
            entry.fetch()
        if self._measures_norm:
            self._list.sum_of_squares(self._sum_of_squares, threads)
        if grad_scale is None and found_inf is None:
            self._list.step(threads, 0, 0)
        else:
            scale, inf = _float32(grad_scale), _float32(found_inf)
            self._list.step(threads, _address(scale), _address(inf))
        # To autograd these are in-place updates: a graph that saved an old value must refuse to use the new one.
        torch.autograd.graph.increment_version(self._list.written())
        for entry in self._staged:
            entry.put_back()


def _float32(scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.to(_CPU, torch.float32)


def _one_of_each_storage(plan: DevicePlan) -> list[Tensor]:
    """Tensors of the state, one for each block of memory: none of those blocks may move unnoticed."""
    tensors: dict[int, Tensor] = {}
    for entry in plan.entries:
        for tensor in (entry.exp_avg, entry.exp_avg_sq, entry.max_exp_avg_sq, entry.step):
            if tensor is not None:
                tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    return [plan.state.skipped, plan.state.grad_norm, *tensors.values()]
