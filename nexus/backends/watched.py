"""What every backend with raw pointers shares: the extension's records, watched for what changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage

from nexus.backends import sharding
from nexus.backends.interface import STATE_NAMES, Change, Glance, Plan, Rate, Runner, TensorEntry
from nexus.backends.records import DTYPES, address, group_values, layout, tensor_values

List = TypeVar("List")


def make_list(kind: Callable[..., List], setting_names: tuple[str, ...]) -> List:
    """One of the extension's lists."""
    tensor = torch.empty(1, device="cpu")
    storage = tensor.untyped_storage()  # the same Python object whenever it is asked for
    storage_references = sys.getrefcount(storage) - 2  # besides the name and the argument
    grad_descriptor = torch._C.TensorBase.__dict__["grad"]
    state = (STATE_NAMES, storage_references, _users, _users(storage))
    return kind(setting_names, *state, grad_descriptor, torch.Tensor.__dlpack_c_exchange_api__, DTYPES)


def _users(storage: UntypedStorage) -> int:
    """How many tensors refer to a storage."""
    return torch._C._storage_Use_Count(storage._cdata)


class WatchedRunner(Runner):
    """Binds plans to a list of the extension. What is done with the list is up to the subclass.

    Args:
        tensors: a `_native.WatchedRecords`.
    """

    def __init__(self, tensors: Any) -> None:
        self._list = tensors
        self._plan: Plan | None = None
        self._staged: list[TensorEntry] = []
        self._host_rates: list[tuple[Tensor, Tensor]] = []

    def changed(self, attributes: dict[str, Any]) -> int:
        return Change.TENSORS if self._plan is None else self._list.refresh(attributes)

    def forget(self) -> None:
        self._plan = None

    def glance(self) -> Glance:
        glance: Glance = self._list.glance()
        return glance

    def release_state(self) -> None:
        self._list.release_state()

    def bind(self, plan: Plan, attributes: dict[str, Any]) -> None:
        self._plan = None  # until the end: a list that is half made is never run
        self._list.begin(attributes)
        self._fill_groups(plan)
        entries = [entry for device_plan in plan.devices.values() for entry in device_plan.entries]
        self._list.fill_tensors(b"".join(layout("TensorRecord").pack(tensor_values(entry)) for entry in entries))
        indices = {id(entry): index for index, entry in enumerate(entries)}
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
                    sharding.placements(param),
                )
        for device_plan in plan.devices.values():
            state = device_plan.state  # whose memory a process that is spawned with the optimizer comes to share
            for tensor in (state.completed, state.skipped, state.sum_of_squares, state.grad_norm):
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
        self._fill_groups(plan)
        self._take_settings(plan)
        self._plan = plan

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

    def _fill_groups(self, plan: Plan) -> None:
        groups = [group for device_plan in plan.devices.values() for group in device_plan.groups]
        self._list.fill_groups(b"".join(layout("Group").pack(group_values(group)) for group in groups))
        rates = [value for group in groups for value in group.values() if isinstance(value, Rate)]
        self._host_rates = [
            (rate.tensor, rate.host) for rate in rates if rate.tensor is not None and rate.host is not None
        ]
        written = {id(rate.last) for rate in rates}
        of_rates = [tensor for rate in rates for tensor in (rate.tensor, rate.table, rate.last) if tensor is not None]
        watched = {id(tensor): tensor for tensor in of_rates}  # groups share the table of a schedule
        for key, tensor in watched.items():
            self._list.watch_setting_tensor(tensor, key in written)


def _fill_from_host(tensor: Tensor, host: Tensor) -> None:
    """Copy a number from the CPU, waiting for nothing; the host's tensor may change as soon as this returns."""
    if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a rate is a tensor on the CPU, and a graph would hold the number that it has now: make that tensor on "
            f"{tensor.device}, or give a Schedule"
        )
    tensor.fill_(float(host.detach()))
