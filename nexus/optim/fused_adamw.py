"""AdamW in one fused update for all parameters, with the learning-rate schedule evaluated inside it."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import Optimizer

from nexus import backends
from nexus.arguments import shown
from nexus.backends.interface import Backend, StepState
from nexus.optim import checkpoint, master, onlookers, parameters, remedies
from nexus.optim.averages import Average
from nexus.optim.averaging import Averaged
from nexus.optim.engine import Engine, attributes_of, devices_of
from nexus.optim.groups import ParamGroup
from nexus.optim.history import History
from nexus.optim.listening import Listening
from nexus.optim.scheduled import Scheduled
from nexus.optim.settings import SETTINGS, checked_settings
from nexus.optim.storage import average_bytes, check_seed, trained_storages
from nexus.optim.torch_options import check_torch_options
from nexus.schedules import Schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class FusedAdamW(Scheduled, Listening, Averaged, Optimizer):
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
        lr: a float (which a torch scheduler may change), a one-element tensor (read at each step), or a `Schedule`,
            which is evaluated by the kernels at the optimizer's own count of completed updates.
        betas: decay rates of the moments, in [0, 1). Each a float, or as `lr` a tensor or a `Schedule`.
        eps: added to the denominator, 0 or above. A float, or as `lr`.
        weight_decay: a float, a one-element tensor or a `Schedule`.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018, arXiv:1904.09237).
        maximize: ascend.
        foreach, capturable, fused: taken, so that `torch.optim.AdamW` can be replaced by name, and of no effect.
        differentiable: must be False.
        max_grad_norm: scale the gradients down to this global 2-norm inside the update, as
            `torch.nn.utils.clip_grad_norm_` would before it. A float, or as `lr`. None or 0: do not, as in
            transformers, DeepSpeed and nanoGPT (a limit that a tensor or a `Schedule` brings near to 0 would be
            its opposite: these stay above 0); `math.inf`: only measure it.
        skip_nonfinite: let a step whose gradients hold an infinity or a NaN change nothing but `skipped_steps`.
        backend: `"auto"`, or one of `"native"` (compiled, CPU), `"cuda"` (compiled, NVIDIA), `"triton"` (where
            Triton runs), `"torch"` (PyTorch's own fused kernel, CPU) and `"reference"` (plain PyTorch, any device).
        norm_group: processes whose optimizers have other parameters of the same model, each its own: the gradient
            norm is that of all of them, and what one skips, all skip. DTensors need none, nor does DDP.
        master_weight_bits: of bfloat16 parameters, keep the low bits of a float32 master weight, so that it has 24
            or all 32 of its bits: 1 or 2 bytes more. None: none.
        exp_avg_dtype: how the first moment is stored: `torch.float32`, `torch.bfloat16` or `torch.int8`. None: in the
            type of the arithmetic.
        exp_avg_sq_dtype: the same for the second moment: `torch.float32`, `torch.bfloat16` or `torch.uint8`. Tensors
            of fewer than 4,096 elements have float32 moments in any case.
        stochastic_rounding: what is stored with fewer bits than it is computed in is rounded up or down by chance,
            in proportion: bfloat16 parameters and first moments. The other moments in fewer bits always are.
        average: an `EMA` or a `Mean` of the parameters, which the same pass updates; see `averaged`. None: none.
        seed: of that chance, an int in [0, 2**63). The same seed gives the same bits, on any device, by any number
            of threads, and of processes where tensors are sharded by rows of a multiple of 128 elements.
        bias_correction: where a beta is a tensor or a `Schedule`, the bias of the moments is 1 minus the product of
            all betas so far (`"product"`), or 1 - beta**t as in torch (`"power"`).

    A group may have its own value of each of these but `skip_nonfinite`, `backend`, `norm_group` and `seed`, and an
    `lr_scale` (1.0, or as `lr`) that multiplies its schedule.

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

    @_disable_dynamo
    def __init__(
        self,
        params: Params,
        lr: float | Tensor | Schedule = 1e-3,
        betas: tuple[float | Tensor | Schedule, float | Tensor | Schedule] = (0.9, 0.999),
        eps: float | Tensor | Schedule = 1e-8,
        weight_decay: float | Tensor | Schedule = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | Tensor | Schedule | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        norm_group: ProcessGroup | None = None,
        master_weight_bits: int | None = None,
        exp_avg_dtype: torch.dtype | None = None,
        exp_avg_sq_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        average: Average | None = None,
        seed: int = 0,
        bias_correction: str = "product",
    ) -> None:
        check_torch_options(
            betas=betas, capturable=capturable, differentiable=differentiable, foreach=foreach, fused=fused
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "max_grad_norm": max_grad_norm,
            "master_weight_bits": master_weight_bits,
            "exp_avg_dtype": exp_avg_dtype,
            "exp_avg_sq_dtype": exp_avg_sq_dtype,
            "stochastic_rounding": stochastic_rounding,
            "average": average,
            "lr_scale": 1.0,
            "bias_correction": bias_correction,
            "lr_schedule": None,
            "weight_decay_schedule": None,
        }
        checked_settings(defaults)
        remedies.check_params(params)
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite must be a bool, got {shown(skip_nonfinite)}")
        if not isinstance(backend, str):
            raise TypeError(f"backend must be a string, got {shown(backend)}")
        if norm_group is not None and not hasattr(norm_group, "allreduce"):
            raise TypeError(
                f"norm_group must be a ProcessGroup of torch.distributed or None, got {shown(norm_group)}"
            )
        check_seed(seed)
        self._engine = Engine(backend, skip_nonfinite=skip_nonfinite, norm_group=norm_group, seed=seed)
        self._new_params: set[int] | None = set()  # of the groups so far, while they are made
        onlookers.mark_for_dynamo()
        super().__init__(params, defaults)
        self._new_params = None
        self._engine.select_backend(attributes_of(self))
        self._engine.settle(attributes_of(self))
        trained_storages(self.param_groups)  # raises where a parameter cannot be stored so

    param_groups: list[ParamGroup]  # type: ignore[assignment]  # torch says dict, which it is

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """As in torch: what has been done for each parameter. The step after a read looks at all of it."""
        attributes = self.__dict__
        try:
            state: defaultdict[Tensor, Any] = attributes["state"]
        except KeyError:
            raise AttributeError("this optimizer has no state yet") from None
        engine = attributes.get("_engine")
        if engine is not None:
            engine.release_state()  # what is deleted from it is to be freed at once
        return state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.__dict__["state"] = value

    # The hot path. `step` is torch's wrapper with hooks and profiler ranges only where there are any.

    @onlookers.own_step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, once. Enqueues work; reads nothing back.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient, or a float written over a scheduled rate. Nothing is changed.
        """
        if is_dynamo_compiling():
            return onlookers.step_outside(self, closure)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        ) and onlookers.runs_hooks(self):
            # As torch's: hooks see only what was given, and may give a closure themselves.
            return self.__step_with_hooks() if closure is None else self.__step_with_hooks(closure)
        return self.__step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # tells torch not to wrap it again

    # Names of two underscores are free for subclasses, which use those of one.

    def __step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        attributes = attributes_of(self)
        self._engine.step(attributes, attributes.get("grad_scale"), attributes.get("found_inf"))
        return loss

    __step_with_hooks = Optimizer.profile_hook_step(__step)

    @_disable_dynamo
    def sync_hyperparameters(self) -> None:
        """Let graphs that have captured a step see what has changed in `param_groups` since.

        `step()` sees that by itself. A replay uses what was there at the capture, or at the last call of this; rates
        that are schedules or tensors move in any case. Waits for nothing.

        Raises:
            RuntimeError: clipping is switched on, and the captured step does not measure the norm.
            TypeError, ValueError: a hyperparameter is not allowed. Graphs stay as they are.
        """
        self._engine.update_captured(attributes_of(self))

    # What torch.optim.Optimizer has.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by `GradScaler` before each step: whether unscaling and skipping are left to the update.

        It then sets `grad_scale` and `found_inf` for the time of the step (it takes a product with a `grad_scale`
        that is there before, so there is none).
        """
        return not onlookers.sees_gradients_first(self, sys._getframe(1))

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with any options of its own; also while training.

        Raises:
            TypeError, ValueError: as the constructor. The optimizer stays as it was.
        """
        params, tensors = parameters.listed_parameters(param_group)
        remedies.warn_of_misspelt(param_group, SETTINGS, stacklevel=5 if self._new_params is None else 9)
        if self._new_params is None:
            checked_settings({**self.defaults, **param_group})
        groups, count = self.param_groups, len(self.param_groups)
        taken = self._new_params
        if taken is None:
            taken = {id(param) for group in groups for param in group["params"]}
        if not taken.isdisjoint(map(id, tensors)):
            raise ValueError("some parameters appear in more than one parameter group")
        self.param_groups = groups[:1]  # torch's asks each of them; one can tell whether parameters have names
        try:
            super().add_param_group({**param_group, "params": params})
            added = ParamGroup(self.param_groups[-1])
        finally:
            self.param_groups = groups
        if isinstance(param_group, ParamGroup):  # of another optimizer, whose scheduler may go on with it
            param_group.update(added)
            added = param_group
        else:
            param_group["params"] = added["params"]  # a generator that was given is at its end
        for _, param, name in parameters.named_parameters([added], first=count):
            if parameters.is_trained(param):
                parameters.check_parameter(param, name)
        if self._new_params is None:
            trained_storages([added], first=count)
        groups.append(added)
        if self._new_params is not None:  # the constructor asks the rest of all groups at once
            self._new_params.update(map(id, tensors))
            return
        try:
            if any(each["params"] for each in groups):  # an empty group is nowhere
                backends.select(self._engine.requested_backend, devices_of(attributes_of(self)))
            self._engine.settle(attributes_of(self))
        except Exception:
            del groups[count:]
            raise

    @_disable_dynamo
    def state_dict(self, *, compact: bool = False) -> dict[str, Any]:
        """As `torch.optim.AdamW`'s, which can load it; with each schedule and its counter. Reads the device.

        Args:
            compact: leave moments and master weights as they are stored, so that the checkpoint is as large as the
                state; `load_state_dict` alone reads it. Else moments are float32 (float64 of float64 parameters), and
                a master weight is there as `master_param`, float32.
        """
        return checkpoint.state_dict(self, compact=compact)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this optimizer, `torch.optim.AdamW` or another AdamW has saved; what it lacks is gone then.

        Schedules stay those of the constructor, and go on from the saved count of updates; where they differ from
        the saved ones, a warning names each field. Moments are copies, in new tensors; where a graph has captured a
        step, or other processes share them, in those that are there.

        Raises:
            ValueError: an entry does not fit, or is another optimizer's; it is named, and nothing is changed.
        """
        checkpoint.load_state_dict(self, state_dict)

    @_disable_dynamo
    def load_master(self, weights: Mapping[str, Tensor] | Iterable[Tensor]) -> None:
        """Take float32 weights, such as a model has before `model.bfloat16()`, with all bits that masters have.

        The parameters become these weights, rounded. What moments there are stay.

        Args:
            weights: float32, by the names of the parameters, as `state_dict()` of the model has them (the optimizer
                is then to be made with `model.named_parameters()`), or in the order of the optimizer's parameters.

        Raises:
            ValueError: a weight is missing or does not fit, or there is no master weight for it. Nothing is changed.

        >>> import torch
        >>> from nexus.optim import FusedAdamW
        >>> model = torch.nn.Linear(4, 1)
        >>> weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        >>> optimizer = FusedAdamW(model.bfloat16().named_parameters(), lr=1e-3, master_weight_bits=32)
        >>> optimizer.load_master(weights)
        """
        self._engine.check_shows_parameters("load_master()")
        master.load_master(self, weights)

    @_disable_dynamo
    def bytes_per_parameter(self) -> float:
        """Bytes that an element of the trained parameters takes on average: its own, its gradient's, its state's.

        >>> import torch
        >>> from nexus.optim import FusedAdamW
        >>> weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
        >>> FusedAdamW([weight], exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8).bytes_per_parameter()
        6.0625
        """
        return average_bytes(self.param_groups)

    @_disable_dynamo
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_engine": self._engine}

    @_disable_dynamo
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._new_params = None
        self._engine.select_backend(attributes_of(self))

    # What it has beyond.

    @property
    def backend(self) -> str:
        """The name of the backend that runs, such as `"native"`."""
        return self._engine.backend.NAME

    @property
    def evaluator(self) -> Backend:
        """The backend, for those who want schedules evaluated as a step evaluates them."""
        return self._engine.backend

    @property
    @_disable_dynamo
    def grad_norm(self) -> Tensor | None:
        """The global 2-norm of the last step's gradients, before clipping: 0-dim float64, on the device.

        None without `max_grad_norm` and `skip_nonfinite`, since nobody asked for it to be computed.
        """
        return self._state().grad_norm if self._engine.measures_norm(self.param_groups) else None

    @property
    @_disable_dynamo
    def skipped_steps(self) -> Tensor:
        """How many steps changed nothing since a gradient was not finite: 0-dim int64, on the device."""
        return self._state().skipped

    def _state(self) -> StepState:
        return self._engine.state_on(devices_of(attributes_of(self))[0])

    @_disable_dynamo
    def history(self, capacity: int = 10_000) -> History:
        """Let each step from now on leave a row on the device, with what it did. It waits for nothing.

        Steps in graphs leave rows too, if they are captured after this; and again after `add_param_group`, since
        existing graphs keep writing to the old memory. A checkpoint or a copy of the optimizer has none.

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
        return self._engine.keep_history(attributes_of(self), capacity)
