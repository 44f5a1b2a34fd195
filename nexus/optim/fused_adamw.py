"""AdamW in one fused update for all parameters, with the learning-rate schedule evaluated inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch.optim.optimizer import Optimizer

from nexus import backends
from nexus.arguments import shown
from nexus.backends import reference
from nexus.backends.interface import Backend, Change, DevicePlan, Plan, Runner, StepState, TensorEntry
from nexus.optim import checkpoint, tensor_list
from nexus.optim.history import History, history_of
from nexus.optim.param_group import SCHEDULABLE, SETTING_NAMES, ParamGroup, check_group, settings_of
from nexus.schedule_table import ScheduleTable
from nexus.schedules import WSD, Schedule

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class FusedAdamW(Optimizer):
    r"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), a drop-in for `torch.optim.AdamW`.

    With :math:`\eta_t` the rate, :math:`\lambda_t` the weight decay and :math:`g_t` the gradient, clipped to
    `max_grad_norm`:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t  = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= (1 - \eta_t \lambda_t) \theta_{t-1}
            - \frac{\eta_t}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Args:
        params: parameters, named parameters or groups, as for any `torch.optim.Optimizer`. float32, float64,
            bfloat16 or float16; of any layout. Moments are float32 for half precision.
        lr: a float (which a torch scheduler may change), a one-element tensor, or a `Schedule`, which is
            evaluated by the kernels at the optimizer's own count of completed updates.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the denominator, 0 or above.
        weight_decay: a float, a one-element tensor or a `Schedule`.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018, arXiv:1904.09237).
        maximize: ascend.
        max_grad_norm: scale the gradients down to this global 2-norm inside the update, as
            `torch.nn.utils.clip_grad_norm_` would before it. None: do not; `math.inf`: only measure it.
        skip_nonfinite: let a step whose gradients hold an infinity or a NaN change nothing but `skipped_steps`.
        backend: `"auto"`, or one of `"native"` (compiled, CPU), `"cuda"` (compiled, NVIDIA), `"triton"` (NVIDIA and
            AMD) and `"reference"` (plain PyTorch, any device).

    A group may have its own value of each of these but the last two, and an `lr_scale` (1.0) that multiplies its
    schedule.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, a parameter that cannot be
            optimized: named, with what was given and what is allowed.

    >>> import torch
    >>> from nexus.optim import FusedAdamW
    >>> from nexus.schedules import WSD
    >>> model = torch.nn.Linear(4, 1)
    >>> schedule = WSD(warmup_steps=10, stable_steps=100, decay_steps=20, peak_lr=1e-3)
    >>> optimizer = FusedAdamW(model.parameters(), lr=schedule, max_grad_norm=1.0)
    >>> for _ in range(6):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(2, 4)).sum().backward()
    ...     optimizer.step()
    >>> optimizer.param_groups[0]["lr"].item() == schedule(5)
    True
    """

    param_groups: list[ParamGroup]  # type: ignore[assignment]  # torch says dict, which it is
    _history: History | None = None  # a copy has none

    # GradScaler asks for this, and sets `grad_scale` and `found_inf` for the time of a step (it takes a product
    # with a `grad_scale` that is there before, so there is none): unscaling and skipping are part of the update.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor | Schedule = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "max_grad_norm": max_grad_norm,
            "lr_scale": 1.0,
            "lr_schedule": None,
            "weight_decay_schedule": None,
        }
        check_group(defaults)
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite must be a bool, got {shown(skip_nonfinite)}")
        if not isinstance(backend, str):
            raise TypeError(f"backend must be a string, got {shown(backend)}")
        self._requested_backend = backend
        self._skip_nonfinite = skip_nonfinite
        self._states: dict[torch.device, StepState] = {}
        self._tables: dict[tuple[Schedule, torch.device], ScheduleTable] = {}
        self._plan: Plan | None = None
        self._planned_amsgrad: list[bool] = []
        self._runner: Runner | None = None
        super().__init__(params, defaults)
        self._backend = backends.select(backend, self._devices())

    # The hot path. `step` is torch's wrapper with hooks and profiler ranges only where there are any.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, once. Enqueues work; reads nothing back.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient, or a float written over a scheduled rate. Nothing is changed.
        """
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        ):
            return self._step_with_hooks(closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # tells torch not to wrap it again

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        runner = self._runner
        change = Change.TENSORS if runner is None else runner.changed()
        if runner is None or change:
            runner = self._prepare(change)
        attributes = self.__dict__
        runner.step(attributes.get("grad_scale"), attributes.get("found_inf"))
        return loss

    _step_with_hooks = Optimizer.profile_hook_step(_step)

    def sync_hyperparameters(self) -> None:
        """Let graphs that have captured a step see what has changed in `param_groups` since.

        `step()` sees that by itself. A replay uses what was there at the capture, or at the last call of this; rates
        that are schedules or tensors move in any case. Waits for nothing.

        Raises:
            RuntimeError: clipping is switched on, and the captured step does not measure the norm.
            TypeError, ValueError: a hyperparameter is not allowed. Graphs stay as they are.
        """
        if self._runner is None:
            return  # no step has been made, let alone captured
        change = self._runner.changed()
        if change:
            self._prepare(change)
        self._runner.update_captured()

    # What happens when something has changed.

    def _prepare(self, change: int = Change.TENSORS) -> Runner:
        """Bring the plan up to date with whatever the user has done since the last step, a `Change`."""
        backend = backends.select(self._requested_backend, self._devices())
        if self._runner is None or backend is not self._backend:
            self._backend, self._plan = backend, None
            self._runner = backend.runner(self.__dict__, SETTING_NAMES)
        if self._plan is not None and change == Change.SETTINGS:
            self._settle_groups()
            if [group["amsgrad"] for group in self.param_groups] == self._planned_amsgrad:
                for device, device_plan in self._plan.devices.items():
                    self._fill_settings(device_plan, device)
                self._runner.update_settings()
                return self._runner
        self._plan = self._make_plan()
        self._planned_amsgrad = [group["amsgrad"] for group in self.param_groups]
        self._runner.bind(self._plan)
        return self._runner

    def _make_plan(self) -> Plan:
        self._settle_groups()
        named = list(self._named_parameters())
        for _, param, name in named:
            tensor_list.check_parameter(param, name)
            tensor_list.check_gradient(param, name)
        tensor_list.check_sharing([(name, param) for _, param, name in named])
        self._init_states()
        devices: dict[torch.device, DevicePlan] = {}
        for device in self._devices():
            devices[device] = DevicePlan(self._state_on(device), [], [], False)
            self._fill_settings(devices[device], device)
        if self._history is not None:
            self._history.attach(next(iter(devices.values())))
        self._states = {device: self._states[device] for device in devices}  # what was left behind goes stale
        self._tables = {key: table for key, table in self._tables.items() if key[1] in devices}
        parameters: list[tuple[Tensor, TensorEntry | None]] = []
        for index, param, name in named:
            entry = None
            if param in self.state:
                amsgrad = self.param_groups[index]["amsgrad"]
                entry = tensor_list.make_entry(param, self.state[param], index, amsgrad=amsgrad, where=name)
                devices[param.device].entries.append(entry)
            parameters.append((param, entry))
        return Plan(parameters, devices)

    def _init_states(self) -> None:
        """Give every parameter that has a gradient its counter and moments, zero; as torch does, not before."""
        starting = [
            (param, self.state[param], group["amsgrad"])
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None or self.state.get(param)
        ]
        tensor_list.complete_states(starting)

    def _fill_settings(self, plan: DevicePlan, device: torch.device) -> None:
        plan.groups = [
            settings_of(group, {name: self._table(s, device).rows for name, s in group.schedules()}, device)
            for group in self.param_groups
        ]
        plan.measures_norm = self._measures_norm

    def _settle_groups(self) -> None:
        """Check every group, and install the schedules that were assigned to one."""
        for index, group in enumerate(self.param_groups):
            if not isinstance(group, ParamGroup):  # put there without add_param_group
                self.param_groups[index] = ParamGroup({**self.defaults, **group})
            self._settle_group(self.param_groups[index])
        used = self._used_schedules()
        self._tables = {key: table for key, table in self._tables.items() if key[0] in used}

    def _used_schedules(self, but: ParamGroup | None = None) -> set[Schedule]:
        return {schedule for group in self.param_groups if group is not but for _, schedule in group.schedules()}

    def _settle_group(self, group: ParamGroup) -> None:
        check_group(group)
        if isinstance(group["betas"], list):
            group["betas"] = tuple(group["betas"])  # a change within a list would go unnoticed
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        for name in SCHEDULABLE:
            assigned = isinstance(group[name], Schedule)
            schedule = group.settle(name, device)
            if schedule is not None:
                if assigned and schedule not in self._used_schedules(but=group):
                    for (other, _), table in self._tables.items():
                        if other == schedule:
                            table.restore({})  # an equal one, whose decay may have begun, was assigned before
                self._show_rate(group, name, schedule)

    def _show_rate(self, group: ParamGroup, name: str, schedule: Schedule) -> None:
        """Let a group show the rate of the next update, where no update has shown one yet."""
        output = group.outputs[name]
        rows = self._table(schedule, output.device).rows
        now = reference.evaluate(rows, self._state_on(output.device).completed)
        output.copy_(now * group["lr_scale"] if name == "lr" else now)

    # Device memory: made once for each device, and followed when the parameters move.

    def _devices(self) -> list[torch.device]:
        params = [param for group in self.param_groups for param in group["params"]]
        return list(dict.fromkeys(param.device for param in params)) or [torch.device("cpu")]

    def _state_on(self, device: torch.device) -> StepState:
        if device not in self._states:
            state = StepState(device, self._skip_nonfinite)
            for other in self._states.values():
                state.completed.copy_(other.completed)
                state.skipped.copy_(other.skipped)
                break
            self._states[device] = state
        return self._states[device]

    def _table(self, schedule: Schedule, device: torch.device) -> ScheduleTable:
        if (schedule, device) not in self._tables:
            table = ScheduleTable(schedule, device)
            for (other, _), source in self._tables.items():
                if other == schedule:
                    table.rows.copy_(source.rows)
                    break
            self._tables[schedule, device] = table
        return self._tables[schedule, device]

    def _named_parameters(self) -> Iterator[tuple[int, Tensor, str]]:
        """(index of the group, parameter, its name in an error)."""
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                yield index, param, f"parameter {names[i] if names else i} of group {index}"

    @property
    def _measures_norm(self) -> bool:
        return self._skip_nonfinite or any(group["max_grad_norm"] is not None for group in self.param_groups)

    # What torch.optim.Optimizer has.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with any options of its own; also while training.

        Raises:
            TypeError, ValueError: as the constructor. The optimizer stays as it was.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {shown(param_group)}")
        if "params" not in param_group:
            raise ValueError(f"param_group must have the key 'params', got {sorted(map(str, param_group))}")
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else params
        if isinstance(params, set) or not isinstance(params, Iterable):
            raise TypeError(f"params must be a tensor or an ordered iterable of tensors, got {shown(params)}")
        params = list(params)
        tensors = [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in params]
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ValueError("a parameter is twice in this group, and would be updated twice in each step")
        check_group({**self.defaults, **param_group})
        count = len(self.param_groups)
        super().add_param_group({**param_group, "params": params})
        try:
            group = self.param_groups[-1] = ParamGroup(self.param_groups[-1])
            for i, param in enumerate(group["params"]):
                tensor_list.check_parameter(param, f"parameter {i} of group {count}")
            backends.select(self._requested_backend, self._devices())
            self._settle_group(group)
        except Exception:
            del self.param_groups[count:]
            raise

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.AdamW`'s, which can load it; with each schedule and its counter. Reads the device."""
        return checkpoint.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this optimizer or `torch.optim.AdamW` has saved, in place.

        Schedules stay those of the constructor, and go on from the saved count of updates; where they differ from
        the saved ones, a warning names each field. Tensors that a step points to are written, not replaced.

        Raises:
            ValueError: an entry does not fit, or is another optimizer's; it is named, and nothing is changed.
        """
        checkpoint.load_state_dict(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_requested_backend", "_skip_nonfinite", "_states", "_tables")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = self._runner = None
        self._backend = backends.select(self._requested_backend, self._devices())

    # What it has beyond.

    @property
    def backend(self) -> str:
        """The name of the backend that runs, such as `"native"`."""
        return self._backend.NAME

    @property
    def evaluator(self) -> Backend:
        """The backend, for who wants schedules evaluated as the step evaluates them."""
        return self._backend

    @property
    def grad_norm(self) -> Tensor | None:
        """The global 2-norm of the last step's gradients, before clipping: 0-dim float64, on the device.

        None without `max_grad_norm` and `skip_nonfinite`, since nobody asked for it to be computed.
        """
        return self._state_on(self._devices()[0]).grad_norm if self._measures_norm else None

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps changed nothing since a gradient was not finite: 0-dim int64, on the device."""
        return self._state_on(self._devices()[0]).skipped

    def history(self, capacity: int = 10_000) -> History:
        """Let each step from now on leave a row on the device, with what it did. It waits for nothing.

        Steps in graphs leave rows too, if they are captured after this; and again after `add_param_group`, since
        graphs that are there go on to write where nobody reads. A checkpoint or a copy of the optimizer has none.

        Args:
            capacity: how many rows are kept; newer ones take the places of the oldest.

        Returns:
            The history, whose `read()` returns the rows since the last read. The same at every call.

        Raises:
            TypeError, ValueError: `capacity` is no count from 1 to 2**31, or not that of the history there is.

        >>> import torch
        >>> from nexus.optim import FusedAdamW
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = FusedAdamW([weight], lr=0.5, max_grad_norm=1.0)
        >>> history = optimizer.history(capacity=100)
        >>> for _ in range(3):
        ...     weight.grad = torch.tensor([3.0, 4.0])
        ...     optimizer.step()
        >>> rows = history.read()
        >>> rows.step.tolist(), rows.lr.tolist(), rows.grad_norm.tolist(), rows.overwritten
        ([0, 1, 2], [[0.5], [0.5], [0.5]], [5.0, 5.0, 5.0], 0)
        """
        return history_of(self, capacity)

    def begin_decay(self) -> None:
        """Let the decay of every WSD schedule of this optimizer begin with the next step.

        It starts from the rate of this moment, whatever that is: from 0, it stays 0. A decay that has begun goes
        on. Reads nothing back from the device.

        Raises:
            RuntimeError: no group has a WSD schedule.
        """
        for table, state in self._wsd_tables():
            table.begin_decay(state.completed)

    def extend_stable(self, n: int) -> None:
        """Make the stable phase of every WSD schedule of this optimizer `n` updates longer.

        A decay that has begun goes on. Reads nothing back from the device.

        Raises:
            RuntimeError: no group has a WSD schedule.
            TypeError, ValueError: `n` is no count, or a stable phase is open-ended.
        """
        tables = self._wsd_tables()
        for table, _ in tables:
            table.check_extend_stable(n)
        for table, state in tables:
            table.extend_stable(n, state.completed)

    def _wsd_tables(self) -> list[tuple[ScheduleTable, StepState]]:
        self._settle_groups()
        schedules = self._used_schedules()
        chosen = [
            (table, self._state_on(device))
            for (schedule, device), table in self._tables.items()
            if isinstance(schedule, WSD) and schedule in schedules
        ]
        if not chosen:
            raise RuntimeError("no parameter group has a WSD schedule; give one as lr, or as weight_decay")
        return chosen
