"""The `Trainer` of Hugging Face transformers, with a FusedAdamW made of its arguments. Imports transformers."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nexus.arguments import shown
from nexus.optim import FusedAdamW
from nexus.schedules import Schedule
from nexus.schedules.imports import from_transformers
from nexus.training.schedulers import FollowingScheduler, ScheduleLR

try:
    from transformers import SchedulerType, TrainingArguments
    from transformers import Trainer as TransformersTrainer
except ImportError as error:
    raise ImportError(
        f"nexus.integrations.transformers needs transformers' Trainer ({error}): pip install transformers accelerate"
    ) from error

__all__ = ["Trainer"]

# The two methods of Trainer that measure and clip gradients. They are not public: with a Trainer that has others,
# gradients would be clipped twice.
if not (hasattr(TransformersTrainer, "_clip_grad_norm") and hasattr(TransformersTrainer, "_get_grad_norm")):
    raise ImportError(
        "nexus.integrations.transformers overrides Trainer._clip_grad_norm and Trainer._get_grad_norm, which this "
        "version of transformers does not have: use one that does, such as 5.23, or give the Trainer of transformers "
        "optimizer_cls_and_kwargs=(FusedAdamW, {...})"
    )

logger = logging.getLogger(__name__)

ADAMW = ("adamw_torch", "adamw_torch_fused")
DRIVEN_BY_A_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


class Trainer(TransformersTrainer):  # type: ignore[misc]
    """The `Trainer` of transformers whose AdamW is nexus's: the arguments stay what they are.

    The optimizer is a `FusedAdamW` of `learning_rate`, `adam_beta1`, `adam_beta2`, `adam_epsilon` and `weight_decay`,
    with Trainer's groups. It also clips the gradients to `max_grad_norm`, in the update, and measures the norm that
    is logged. The scheduler has the rates that `lr_scheduler_type`, `lr_scheduler_kwargs` and `warmup_steps` give in
    transformers, computed on the device; Trainer tells it the number of steps, also where it trains for epochs. Only
    `"reduce_lr_on_plateau"` and `"greedy"`, which follow a metric of the evaluation, stay transformers' schedulers.

    Checkpoints are interchangeable with those of the `Trainer` of transformers with `torch.optim.AdamW`, both ways,
    where the arguments name the schedule.

    To add an option of `FusedAdamW`, give `optimizer_cls_and_kwargs=(FusedAdamW, {"skip_nonfinite": True})`: what is
    not there comes from the arguments. If `"lr"` is a `Schedule` there, the scheduler follows it. To combine this
    class with another Trainer, as in `class SFT(Trainer, SFTTrainer)`, put this one first.

    Raises:
        ValueError: `optim` names no AdamW of torch's, DeepSpeed is to make the optimizer, FSDP1 to shard it, or
            groups have rates of their own in place of an `lr_scale`.
        TypeError: another optimizer was given.

    >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    >>> from nexus.integrations.transformers import Trainer
    >>> sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes))
    >>> arguments = TrainingArguments("out", learning_rate=1e-3, lr_scheduler_type="linear", use_cpu=True)
    >>> trainer = Trainer(model, arguments)
    >>> trainer.create_optimizer_and_scheduler(num_training_steps=100)
    >>> trainer.lr_scheduler.schedule
    Linear(start_lr=0.001, end_lr=0.0, total_steps=100)
    """

    args: TrainingArguments
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None
    optimizer: Any  # accelerate's wrapper of it while training
    lr_scheduler: Any

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed makes optimizers of its own: use the Trainer of transformers with it")
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and plugin is not None and plugin.fsdp_version == 1:
            raise ValueError(
                "under FSDP1 each process would clip by the norm of its own part: use FSDP2 (fsdp_version: 2 in "
                "fsdp_config), or the Trainer of transformers"
            )
        given = self.optimizer_cls_and_kwargs
        if self.optimizer is None:
            self.optimizer_cls_and_kwargs = _asked_for(self.args, given)
        try:
            super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given
        _unwrapped(self.optimizer)  # raises for another optimizer
        return self.optimizer  # type: ignore[no-any-return]

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None and self.args.lr_scheduler_type not in DRIVEN_BY_A_METRIC:
            fused = _unwrapped(self.optimizer if optimizer is None else optimizer)
            self.lr_scheduler = _scheduler(self.args, fused, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[no-any-return]

    def _clip_grad_norm(self, model: Any) -> Tensor:
        norm = self._norm_of_update()
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = self._norm_of_update()
        return super()._get_grad_norm(model, grad_norm) if norm is None else norm

    def _norm_of_update(self) -> Tensor | None:
        """The norm in device memory, where the coming update writes it before Trainer reads it for its log.

        None where Trainer is to clip, as the optimizer does not.
        """
        optimizer = _unwrapped(self.optimizer)
        limits = [group["max_grad_norm"] for group in optimizer.param_groups]
        clips = any(isinstance(each, (Tensor, Schedule)) or each not in (None, 0.0, math.inf) for each in limits)
        return optimizer.grad_norm if clips or not _clips(self.args) else None


class _TrainersScheduler(ScheduleLR[Schedule]):
    """A scheduler that also goes on from the checkpoint of a LambdaLR, which is Trainer's own, and the other way."""

    def step(self, epoch: int | None = None) -> None:
        # torch's would warn: accelerate's scaler puts back the optimizer's step() of before there was a scheduler.
        self._step_count += 1
        self._update_lr(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lr_lambdas": [None] * len(self.base_lrs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        said = []
        if "schedule" not in state_dict and "lr_lambdas" in state_dict:
            counts = {name: state_dict[name] for name in ("last_epoch", "_step_count")}
            then, now = state_dict["base_lrs"], self.base_lrs
            if list(then) != list(now):
                said.append(f"learning_rate was {then[0]} and is {now[0]} now; the run goes on with the latter")
            state_dict = {**super().state_dict(), **counts}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            super().load_state_dict(state_dict)
        for words in (*said, *(str(warning.message) for warning in caught)):
            logger.warning(words)  # Trainer would drop a warning


def _asked_for(args: TrainingArguments, given: tuple[type, dict[str, Any]] | None) -> tuple[type, dict[str, Any]]:
    """What Trainer is to make the optimizer of."""
    if given is None and args.optim not in ADAMW:
        raise ValueError(
            f"this Trainer trains with FusedAdamW, and optim={args.optim.value!r} asks for another optimizer: leave "
            "it out, or use the Trainer of transformers; optimizer_cls_and_kwargs=(FusedAdamW, {...}) takes options, "
            "such as those for low-memory state"
        )
    kind, options = (FusedAdamW, {}) if given is None else given
    if not (isinstance(kind, type) and issubclass(kind, FusedAdamW)):
        raise TypeError(
            "this Trainer trains with FusedAdamW: give optimizer_cls_and_kwargs=(FusedAdamW, {...}), got "
            f"{shown(kind)}; for another optimizer, use the Trainer of transformers"
        )
    from_arguments = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "max_grad_norm": args.max_grad_norm if _clips(args) else math.inf,  # it measures the norm for the log
    }
    return kind, {**from_arguments, **options}


def _clips(args: TrainingArguments) -> bool:
    return args.max_grad_norm is not None and args.max_grad_norm > 0


def _scheduler(args: TrainingArguments, optimizer: FusedAdamW, steps: int) -> LRScheduler:
    groups = optimizer.param_groups
    if any(isinstance(rate, Schedule) for group in groups for rate in (group["lr"], group.get("lr_schedule"))):
        return FollowingScheduler(optimizer)
    rates = {float(group.get("initial_lr", group["lr"])) for group in groups}
    if len(rates) > 1:
        raise ValueError(
            f"the groups of the optimizer have different rates, {sorted(rates)}: give each an 'lr_scale', which "
            "multiplies learning_rate, in place of an 'lr', as param_groups(model, layer_decay=...) does"
        )
    schedule = from_transformers(
        args.lr_scheduler_type,
        rates.pop(),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        **(args.lr_scheduler_kwargs or {}),
    )
    return _TrainersScheduler(optimizer, schedule=schedule)


def _unwrapped(optimizer: Any) -> FusedAdamW:
    """The FusedAdamW itself, without the wrapper that accelerate puts around it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, FusedAdamW):
        raise TypeError(
            f"this Trainer trains with FusedAdamW: optimizers= must hold one, got {shown(inner)}; for another "
            "optimizer, use the Trainer of transformers"
        )
    return inner
