"""What every backend with raw pointers shares: the extension's list of tensors, which notices what changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nexus.backends import shards
from nexus.backends.interface import STATE_NAMES, Change, DevicePlan, Plan, Rate, Ring, TensorEntry

try:
    from nexus import _native as extension
except ImportError as error:
    extension = None  # type: ignore[assignment]
    _import_error = str(error)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of the C++ enum
DTYPE_INDEX = {dtype: index for index, dtype in enumerate(DTYPES)}

__all__ = [
    "DTYPES",
    "DTYPE_INDEX",
    "WatchedRunner",
    "address",
    "extension",
    "history_fields",
    "make_list",
    "rate_fields",
    "state_fields",
    "unavailable",
]

List = TypeVar("List")


def unavailable(devices: Iterable[torch.device] = ()) -> str | None:
    """Why the extension is not there: the compiler's words, where the install wrote them down."""
    if extension is not None:
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


def make_list(kind: Callable[..., List], setting_names: tuple[str, ...]) -> List:
    """One of the extension's lists."""
    tensor = torch.empty(1, device="cpu")
    storage = tensor.untyped_storage()  # the same Python object whenever it is asked for
    storage_references = sys.getrefcount(storage) - 2  # besides the name and the argument
    count_users = getattr(torch._C, "_storage_Use_Count", None)
    if count_users is not None:
        of_address, count_users = count_users, lambda storage: of_address(storage._cdata)
    storage_users = 0 if count_users is None else count_users(storage)
    grad_descriptor = torch._C.TensorBase.__dict__["grad"]
    exchange_api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    state = (STATE_NAMES, storage_references, count_users, storage_users)
    return kind(setting_names, *state, grad_descriptor, exchange_api, DTYPES)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's memory is; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def rate_fields(rate: Rate) -> tuple[float, int, int, int, int, float, int]:
    """A rate as the extension takes it."""
    return (
        rate.value,
        address(rate.tensor),
        0 if rate.tensor is None else DTYPE_INDEX[rate.tensor.dtype],
        address(rate.table),
        0 if rate.table is None else rate.table.shape[0],
        rate.scale,
        address(rate.last),
    )


def history_fields(ring: Ring | None) -> tuple[int, int, int, int]:
    """A history as the extension takes it: count, rows, slots, width."""
    return (0, 0, 0, 0) if ring is None else (ring.count.data_ptr(), ring.rows.data_ptr(), ring.slots, ring.width)


def state_fields(plan: DevicePlan) -> tuple[int, int, int, int, bool, tuple[int, int, int, int]]:
    """What a step works on besides tensors and groups, as the extension takes it; no norm where nobody wants one."""
    state = plan.state
    return (
        state.completed.data_ptr(),
        state.skipped.data_ptr(),
        state.sum_of_squares.data_ptr() if plan.measures_norm else 0,
        state.grad_norm.data_ptr(),
        state.skip_nonfinite,
        history_fields(plan.history),
    )


class WatchedRunner:
    """Binds plans to a list of the extension. What is done with the list is up to the subclass.

    Args:
        tensors: a `_native.WatchedList`.
    """

    name: str

    def __init__(self, tensors: Any) -> None:
        self._list = tensors
        self._plan: Plan | None = None
        self._staged: list[TensorEntry] = []
        self._host_rates: list[tuple[Tensor, Tensor]] = []

    def changed(self, attributes: dict[str, Any]) -> int:
        return Change.TENSORS if self._plan is None else self._list.refresh(attributes)

    def forget(self) -> None:
        self._plan = None

    def release_state(self) -> None:
        self._list.release_state()

    def bind(self, plan: Plan, attributes: dict[str, Any]) -> None:
        self._plan = None  # until the end: a list that is half made is never run
        self._list.begin(attributes)
        self._add_groups(plan)
        entries = [entry for device_plan in plan.devices.values() for entry in device_plan.entries]
        indices = {id(entry): self._add_tensor(entry) for entry in entries}
        for param, watched in plan.parameters:
            if watched is None:
                self._list.watch_parameter(param)
            else:
                self._list.watch_entry(
                    param,
                    indices[id(watched)],
                    watched.param,
                    watched.param_buffer is not None,
                    watched.grad_buffer is not None,
                    address(watched.grad_buffer),
                    shards.placements(param),
                )
        for device_plan in plan.devices.values():
            for tensor in (device_plan.state.skipped, device_plan.state.grad_norm):  # which users are given
                self._list.watch_tensor(tensor)
        self._take_tensors(plan)
        for entry in entries:
            entry.state = None
        self._staged = [entry for entry in entries if entry.staged]
        change = self._list.refresh(attributes)  # reads where the gradients are
        first, second = self._list.overlap()
        if first >= 0:
            both = (entries[first], entries[second])
            where = [index for index, (_, entry) in enumerate(plan.parameters) if entry in both]
            raise ValueError(
                f"parameters {where[0]} and {where[1]} (in the order of the groups) share memory, and would be "
                "updated at once by two threads; give the optimizer one tensor for both"
            )
        if change == Change.TENSORS:
            raise RuntimeError(
                "a parameter, a gradient or its state cannot be read where it is. Another thread may have changed it "
                "in the middle of this step; if none has, please report this"
            )
        self._plan = plan

    def update_settings(self) -> None:
        plan, self._plan = self._plan, None  # until the end, as in bind()
        assert plan is not None
        self._list.begin_groups()
        self._add_groups(plan)
        self._take_settings(plan)
        self._plan = plan

    def has_captured(self) -> bool:
        return False

    def update_captured(self) -> None:
        """What `changed` has found is not for a step to come. Where nothing is captured, there is no more to do."""
        self._list.release_gradients()

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for entry in self._staged:
            entry.fetch()
        for tensor, host in self._host_rates:
            _fill_from_host(tensor, host)
        assert self._plan is not None
        try:
            self._run(self._plan, grad_scale, found_inf)
        except BaseException:
            self._list.release_gradients()
            raise
        # To autograd these are in-place updates: a graph that saved an old value must refuse to use the new one.
        torch.autograd.graph.increment_version(self._list.written())
        for entry in self._staged:
            entry.put_back()

    def _take_tensors(self, plan: Plan) -> None:
        """Take over a plan, of which the list knows everything."""
        raise NotImplementedError

    def _take_settings(self, plan: Plan) -> None:
        """Take over the hyperparameters of a plan's groups, which the list knows."""
        raise NotImplementedError

    def _run(self, plan: Plan, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update everything once."""
        raise NotImplementedError

    def _add_groups(self, plan: Plan) -> None:
        self._host_rates = []
        for device_plan in plan.devices.values():
            for group in device_plan.groups:
                for rate in (group.lr, group.weight_decay):
                    for tensor in (rate.tensor, rate.last):
                        if tensor is not None:
                            self._list.watch_setting_tensor(tensor, tensor is rate.last)
                    if rate.tensor is not None and rate.host is not None:
                        self._host_rates.append((rate.tensor, rate.host))
                self._list.add_group(
                    rate_fields(group.lr),
                    rate_fields(group.weight_decay),
                    *group.betas,
                    group.eps,
                    group.max_grad_norm,
                    group.maximize,
                )

    def _add_tensor(self, entry: TensorEntry) -> int:
        param, grad, state = entry.param, entry.grad, entry.state
        assert state is not None
        index: int = self._list.add_tensor(
            param.data_ptr(),
            state.exp_avg.data_ptr(),
            state.exp_avg_sq.data_ptr(),
            address(state.max_exp_avg_sq),
            state.step.data_ptr(),
            param.numel(),
            entry.group,
            DTYPE_INDEX[param.dtype],
            DTYPE_INDEX[param.dtype if grad is None else grad.dtype],
        )
        return index


def _fill_from_host(tensor: Tensor, host: Tensor) -> None:
    """Copy a number from the CPU, waiting for nothing; the host's tensor may change as soon as this returns."""
    if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a rate is a tensor on the CPU, and a graph would hold the number that it has now: make that tensor on "
            f"{tensor.device}, or give a Schedule"
        )
    tensor.fill_(float(host.detach()))
