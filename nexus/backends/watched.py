"""What every backend with raw pointers shares: the extension's records, watched for what changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage

from nexus.backends import sharding
from nexus.backends.interface import LAST_WRITE, STATE_NAMES, Change, Glance, Plan, Rate, Runner, TensorEntry
from nexus.backends.records import DTYPES, address, group_values, layout, tensor_values
from nexus.backends.sharding import total_everywhere

Records = TypeVar("Records")


def make_records(kind: Callable[..., Records], setting_names: tuple[str, ...]) -> Records:
    """The records of one optimizer: a `WatchedRecords` of the extension, or of a kind of these."""
    tensor = torch.empty(1, device="cpu")
    storage = tensor.untyped_storage()  # the same Python object whenever it is asked for
    storage_references = sys.getrefcount(storage) - 2  # besides the name and the argument
    grad_descriptor = torch._C.TensorBase.__dict__["grad"]
    state = (STATE_NAMES, storage_references, _users, _users(storage))
    return kind(setting_names, LAST_WRITE, *state, grad_descriptor, torch.Tensor.__dlpack_c_exchange_api__, DTYPES)


def _users(storage: UntypedStorage) -> int:
    """How many tensors refer to a storage."""
    return torch._C._storage_Use_Count(storage._cdata)


class WatchedRunner(Runner):
    """Binds plans to records of the extension. What is done with these is up to the subclass."""

    def __init__(self, records: Any) -> None:
        self.records = records
        self._plan: Plan | None = None
        self._sums: list[Tensor] = []  # of squares, on the devices that measure the norm
        self._staged: list[TensorEntry] = []
        self._host_rates: list[tuple[Tensor, Tensor]] = []

    def changed(self, attributes: dict[str, Any]) -> int:
        return Change.TENSORS if self._plan is None else self.records.refresh(attributes)

    def forget(self) -> None:
        self._plan = None
        self.records.release_gradients()

    def glance(self) -> Glance:
        glance: Glance = self.records.glance()
        return glance

    def release_state(self) -> None:
        self.records.release_state()

    def bind(self, plan: Plan, attributes: dict[str, Any]) -> None:
        self._plan = None  # until the end: what is half made is never run
        self.records.begin(attributes)
        self._fill_groups(plan)
        entries = [entry for device_plan in plan.devices.values() for entry in device_plan.entries]
        self.records.fill_tensors(b"".join(layout("TensorRecord").pack(tensor_values(entry)) for entry in entries))
        indices = {id(entry): index for index, entry in enumerate(entries)}
        for param, watched in plan.parameters:
            if watched is None:
                self.records.watch_parameter(param)
            else:
                self.records.watch_entry(
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
                self.records.watch_tensor(tensor)
        self._take_tensors(plan)
        for entry in entries:
            entry.state = None
        self._staged = [entry for entry in entries if entry.staged]
        change = self.records.refresh(attributes)  # reads where the gradients are
        first, second = self.records.overlap()
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
        self.records.release_gradients()

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        assert self._plan is not None
        try:
            for entry in self._staged:
                entry.fetch()
            self._bring_rates()
            self._run(self._plan, grad_scale, found_inf)
        except BaseException:
            self.records.release_gradients()
            raise
        # To autograd these are in-place updates: a graph that saved an old value must refuse to use the new one.
        torch.autograd.graph.increment_version(self.records.written())
        for entry in self._staged:
            entry.put_back()

    def _bring_rates(self) -> None:
        for tensor, host in self._host_rates:
            _fill_from_host(tensor, host)

    def _take_tensors(self, plan: Plan) -> None:
        """Take over a plan, which is in the records."""
        raise NotImplementedError

    def _take_settings(self, plan: Plan) -> None:
        """Take over the hyperparameters of a plan's groups, which are in the records."""
        raise NotImplementedError

    def _run(self, plan: Plan, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update everything once."""
        if self._sums or plan.norm_parts:
            self._measure()
            found_inf = total_everywhere(self._sums, plan.norm_parts, found_inf)
        self._update(grad_scale, found_inf)

    def _measure(self) -> None:
        """Leave the sum of squares of the gradients in the state of each device that measures the norm."""
        raise NotImplementedError

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update every tensor, and advance the counters."""
        raise NotImplementedError

    def _fill_groups(self, plan: Plan) -> None:
        self._sums = [device.state.sum_of_squares for device in plan.devices.values() if device.measures_norm]
        groups = [group for device_plan in plan.devices.values() for group in device_plan.groups]
        self.records.fill_groups(b"".join(layout("Group").pack(group_values(group)) for group in groups))
        rates = [value for group in groups for value in group.values() if isinstance(value, Rate)]
        self._host_rates = [
            (rate.tensor, rate.host) for rate in rates if rate.tensor is not None and rate.host is not None
        ]
        written = {id(rate.last) for rate in rates}
        every = [tensor for rate in rates for tensor in (rate.tensor, rate.table, rate.clock, rate.last)]
        of_rates = [tensor for tensor in every if tensor is not None]
        watched = {id(tensor): tensor for tensor in of_rates}  # groups share the table of a schedule
        for key, tensor in watched.items():
            self.records.watch_setting_tensor(tensor, key in written)


def as_float32(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    """What a `GradScaler` gives a step, as kernels on a device read it."""
    return None if scalar is None else sharding.brought(scalar, device).float()


def _fill_from_host(tensor: Tensor, host: Tensor) -> None:
    """Copy a number from the CPU, waiting for nothing; the host's tensor may change as soon as this returns."""
    if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a rate is a tensor on the CPU, and a graph would hold the number that it has now: make that tensor on "
            f"{tensor.device}, or give a Schedule"
        )
    tensor.fill_(float(host.detach()))
