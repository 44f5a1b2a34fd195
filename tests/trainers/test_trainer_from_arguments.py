"""The Trainer of nexus.integrations.transformers beside that of transformers, of the same arguments."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_cases import same_on_all_ranks
from references import same_bits, snapshot
from torch.nn.parallel import DistributedDataParallel
from worlds import in_processes

from nexus.optim import FusedAdamW, param_groups
from nexus.schedules import WSD
from nexus.training.schedulers import FollowingScheduler

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported
pytest.importorskip("transformers")

import transformers
from accelerate_cases import in_this_world
from transformers import SchedulerType, TrainingArguments
from transformers_cases import (
    STEPS,
    alone,  # noqa: F401  # a fixture
    assert_same_trained,
    float64_loss,
    gpt2,
    logged,
    make_data,
    steps_logged,
    train,
    unwrapped,
)

from nexus.integrations.transformers import Trainer

# By how many units in the last place of the peak, in float64, rates may differ: transformers multiplies the rate by a
# rounded factor. Measured: 2.5.
ULPS = 4
KWARGS = {
    SchedulerType.COSINE_WITH_RESTARTS: {"num_cycles": 3},
    SchedulerType.POLYNOMIAL: {"power": 2.0, "lr_end": 1e-5},
    SchedulerType.INVERSE_SQRT: {"timescale": 7},
    SchedulerType.COSINE_WITH_MIN_LR: {"min_lr": 1e-4},
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    SchedulerType.WARMUP_STABLE_DECAY: {"num_decay_steps": 5, "decay_type": "1-sqrt"},
}
FOLLOW_A_METRIC = [SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY]
EPOCHS = {"num_train_epochs": 2.5, "max_steps": -1, "warmup_steps": 0.2}  # 15 updates, 3 of them warm-up
SAVING = {"save_strategy": "steps", "save_steps": 8}  # in the middle of an epoch, which is 6 updates


def make(
    kind: type[Any], folder: Path, model: Any = None, given: dict[str, Any] | None = None, **options: Any
) -> Any:
    """One of the two, of these arguments, and `given` besides."""
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-7,
        "weight_decay": 0.1,
        "max_grad_norm": 0.4,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    usual = {"model": gpt2() if model is None else model, "train_dataset": make_data()}
    given = {**usual, "compute_loss_func": float64_loss, **(given or {})}
    return kind(args=arguments, **given)


def assert_rates(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, rel=0, abs=ULPS * math.ulp(max(expected)))


def assert_same_runs(found: Any, expected: Any) -> None:
    assert_same_trained(found, expected)
    assert_rates(logged(found, "learning_rate"), logged(expected, "learning_rate"))
    for key in ("loss", "grad_norm"):
        assert logged(found, key) == pytest.approx(logged(expected, key), rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {**EPOCHS, "lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}},
        {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "adamw_torch"},
    ],
    ids=["linear", "cosine by epochs", "warmup_stable_decay", "constant, not clipped"],
)
def test_a_run_is_that_of_transformers_with_torchs_adamw(options: dict[str, Any], tmp_path: Path) -> None:
    found, expected = (train(make(kind, tmp_path, **options)) for kind in (Trainer, transformers.Trainer))
    assert_same_runs(found, expected)
    assert isinstance(unwrapped(found), FusedAdamW)
    assert expected.state.global_step == (15 if "num_train_epochs" in options else STEPS)
    norms = logged(expected, "grad_norm")
    assert sum(norm > 0.4 for norm in norms) >= len(norms) / 2  # clipping has had something to do


@pytest.mark.parametrize("warmup", [0, 0.1], ids=["no warm-up", "a ratio"])
@pytest.mark.parametrize("name", [name for name in SchedulerType if name not in FOLLOW_A_METRIC])
def test_the_rates_of_each_type_are_those_of_transformers(name: SchedulerType, warmup: float, tmp_path: Path) -> None:
    kwargs = KWARGS.get(name, {})
    if name == SchedulerType.COSINE_WARMUP_WITH_MIN_LR and warmup == 0:
        kwargs = {"min_lr_rate": 0.1}
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "warmup_steps": warmup}
    rates = []
    for kind in (Trainer, transformers.Trainer):
        trainer = make(kind, tmp_path, **options)
        trainer.create_optimizer_and_scheduler(num_training_steps=37)
        for param in trainer.model.parameters():
            param.grad = torch.zeros_like(param)
        rates.append([])
        for _ in range(40):
            trainer.optimizer.step()
            rates[-1].append(float(trainer.optimizer.param_groups[0]["lr"]))
            assert trainer.lr_scheduler.get_last_lr()[0] == rates[-1][-1]
            trainer.lr_scheduler.step()
    assert_rates(*rates)
    assert len(set(rates[1])) > 1 or name == SchedulerType.CONSTANT or (warmup == 0 and "constant" in name.value)


@pytest.mark.parametrize("name", FOLLOW_A_METRIC)
def test_a_scheduler_that_follows_a_metric_stays_that_of_transformers(name: SchedulerType, tmp_path: Path) -> None:
    kwargs = {"factor": 0.5, "patience": 0, "threshold": 10.0}  # which no loss meets
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "eval_strategy": "steps", "eval_steps": 2}
    given = {"eval_dataset": make_data()}
    found, expected = (
        train(make(kind, tmp_path, given=given, metric_for_best_model="loss", **options))
        for kind in (Trainer, transformers.Trainer)
    )
    assert_same_runs(found, expected)
    assert len(set(logged(found, "learning_rate"))) > 2


def test_gradients_are_clipped_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(Trainer, tmp_path)
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", None)  # which Trainer would call
    train(trainer)
    assert [group["max_grad_norm"] for group in unwrapped(trainer).param_groups] == [0.4, 0.4]
    assert logged(trainer, "grad_norm")[-1] == unwrapped(trainer).grad_norm.item()


# Resumed, and trained again.


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    options = {**SAVING, **EPOCHS, "lr_scheduler_type": "cosine"}
    first = train(make(Trainer, tmp_path, gpt2(torch.float32), **options))
    second = make(Trainer, tmp_path / "second", gpt2(torch.float32, seed=1), **options)
    train(second, tmp_path / "checkpoint-8")
    assert same_bits(snapshot(unwrapped(second)), snapshot(unwrapped(first)))
    assert steps_logged(second.state.log_history) == steps_logged(first.state.log_history)


@pytest.mark.parametrize("began", [Trainer, transformers.Trainer], ids=["nexus", "transformers"])
def test_either_goes_on_from_a_checkpoint_of_the_other(began: type[Any], tmp_path: Path) -> None:
    goes_on = transformers.Trainer if began is Trainer else Trainer
    whole = train(make(began, tmp_path, **SAVING))
    resumed = make(goes_on, tmp_path / "second", gpt2(seed=1), **SAVING)
    train(resumed, tmp_path / "checkpoint-8")
    assert_same_runs(resumed, whole)


def test_a_second_call_of_train_starts_the_schedule_again(tmp_path: Path) -> None:
    runs = [make(kind, tmp_path) for kind in (Trainer, transformers.Trainer)]
    for trainer in runs:
        train(train(trainer))
    assert_rates(*(logged(trainer, "learning_rate") for trainer in runs))


def test_a_model_that_is_made_anew_gets_an_optimizer_of_its_own(tmp_path: Path) -> None:
    found, expected = (
        train(make(kind, tmp_path, given={"model": None, "model_init": lambda: gpt2()}))
        for kind in (Trainer, transformers.Trainer)
    )
    assert_same_runs(found, expected)


def test_scaled_gradients_are_clipped_by_their_true_norm_and_an_overflow_is_skipped(tmp_path: Path) -> None:
    """As with fp16=True on a GPU, where alone accelerate has a scaler; it does its work on the CPU as well."""
    runs = []
    for kind in (Trainer, transformers.Trainer):
        losses = iter(range(2 * STEPS))

        def overflowing(outputs: Any, labels: Any, num_items_in_batch: Any, losses: Any = losses) -> Any:
            return float64_loss(outputs, labels, num_items_in_batch) * (torch.inf if next(losses) == 11 else 1.0)

        trainer = make(kind, tmp_path, given={"compute_loss_func": overflowing}, optim="adamw_torch")
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
        trainer.accelerator.autocast = contextlib.nullcontext  # the model computes in float64 all the same
        runs.append(train(trainer))
        assert trainer.lr_scheduler.last_epoch == STEPS - 1
    found, expected = runs
    assert_rates(*(logged(trainer, "learning_rate") for trainer in runs))
    assert logged(found, "learning_rate")[5] == logged(found, "learning_rate")[6]
    norms, others = (logged(trainer, "grad_norm") for trainer in runs)
    assert norms[:5] + norms[6:] == pytest.approx(others[:5] + others[6:], rel=1e-12)
    assert_same_trained(found, expected, skipped=1)


@in_processes(2)
@in_this_world()
def test_two_processes_train_as_in_transformers(tmp_path: Path) -> None:
    options = {**EPOCHS, "gradient_accumulation_steps": 1, "ddp_find_unused_parameters": False}
    found, expected = (train(make(kind, tmp_path, **options)) for kind in (Trainer, transformers.Trainer))
    assert isinstance(found.model_wrapped, DistributedDataParallel)
    assert_same_runs(found, expected)
    assert same_on_all_ranks(unwrapped(found).grad_norm, *found.model.parameters())


def test_it_comes_before_another_subclass(tmp_path: Path) -> None:
    class Other(transformers.Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            made.append(super().create_optimizer(model))
            return made[-1]

    class Both(Trainer, Other):
        pass

    made: list[Any] = []
    found = train(make(Both, tmp_path))
    assert unwrapped(found) is made[0]
    assert_same_runs(found, train(make(transformers.Trainer, tmp_path)))


# What else is given.


def test_options_are_added_to_those_of_the_arguments(tmp_path: Path) -> None:
    given = {"optimizer_cls_and_kwargs": (FusedAdamW, {"skip_nonfinite": True, "eps": 1e-3})}
    trainer = make(Trainer, tmp_path, given=given)
    group = trainer.create_optimizer().param_groups[0]
    assert (group["lr"], group["weight_decay"], group["max_grad_norm"]) == (1e-2, 0.1, 0.4)
    assert (group["eps"], group["betas"]) == (1e-3, (0.9, 0.99))
    for param in trainer.model.parameters():
        param.grad = torch.full_like(param, torch.inf)
    trainer.optimizer.step()
    assert trainer.optimizer.skipped_steps == 1


def test_a_schedule_among_the_options_is_followed(tmp_path: Path) -> None:
    schedule = WSD(warmup_steps=3, stable_steps=6, decay_steps=4, peak_lr=1e-2)
    trainer = train(make(Trainer, tmp_path, given={"optimizer_cls_and_kwargs": (FusedAdamW, {"lr": schedule})}))
    assert isinstance(trainer.lr_scheduler, FollowingScheduler)
    assert logged(trainer, "learning_rate") == schedule.values(0, STEPS)


def test_groups_by_depth_scale_the_rate(tmp_path: Path) -> None:
    model = gpt2()
    options = {"params": param_groups(model, weight_decay=0.1, layer_decay=0.5)}
    trainer = train(make(Trainer, tmp_path, model, given={"optimizer_cls_and_kwargs": (FusedAdamW, options)}))
    scales = [group["lr_scale"] for group in unwrapped(trainer).param_groups]
    assert trainer.lr_scheduler.get_last_lr() == [scale * trainer.lr_scheduler.schedule(STEPS) for scale in scales]
    assert len(set(scales)) > 2


@pytest.mark.parametrize(
    "clips",
    [
        {"max_grad_norm": None},
        {"max_grad_norm": None, "skip_nonfinite": True},
        {"max_grad_norm": math.inf},
        {"max_grad_norm": 0.4},
    ],
    ids=[
        "Trainer clips",
        "Trainer clips, FusedAdamW skips",
        "Trainer clips, FusedAdamW measures",
        "FusedAdamW clips",
    ],
)
def test_an_optimizer_made_by_hand_is_taken(clips: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for kind in (Trainer, transformers.Trainer):
        model = gpt2()
        options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1}
        optimizer = (
            FusedAdamW(model.parameters(), **options, **clips)
            if kind is Trainer
            else torch.optim.AdamW(model.parameters(), **options)
        )
        runs.append(train(make(kind, tmp_path, model, given={"optimizers": (optimizer, None)})))
    assert_same_runs(*runs)


@pytest.mark.parametrize(
    ("began", "words"),
    [(transformers.Trainer, "learning_rate was 0.01 and is 0.02 now"), (Trainer, "end_lr was 0.01")],
    ids=["transformers", "nexus"],
)
def test_another_rate_than_that_of_the_checkpoint_is_logged(
    began: type[Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(make(began, tmp_path, **SAVING))
    train(make(Trainer, tmp_path / "second", **SAVING, learning_rate=2e-2), tmp_path / "checkpoint-8")
    assert words in "".join(caplog.messages)


def test_what_cannot_be_is_refused_with_the_remedy(tmp_path: Path) -> None:
    def created(options: dict[str, Any] | None = None, **given: Any) -> Any:
        return make(Trainer, tmp_path, given=given, **(options or {})).create_optimizer_and_scheduler(10)

    sharded = make(Trainer, tmp_path)
    sharded.is_fsdp_enabled, sharded.accelerator = (
        True,
        SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))),
    )
    with pytest.raises(
        ValueError, match="under FSDP1 each process would clip by the norm of its own part: use FSDP2"
    ):
        sharded.create_optimizer()
    with pytest.raises(ValueError, match="optim='adafactor' asks for another optimizer: leave it out"):
        created({"optim": "adafactor"})
    with pytest.raises(TypeError, match=r"give optimizer_cls_and_kwargs=\(FusedAdamW, \{\.\.\.\}\), got .*SGD"):
        created(optimizer_cls_and_kwargs=(torch.optim.SGD, {}))
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    with pytest.raises(TypeError, match=r"optimizers= must hold one, got .*SGD"):
        created(optimizers=(torch.optim.SGD(params), None))
    groups = [{"params": [param], "lr": rate} for param, rate in zip(params, (1e-2, 1e-3), strict=True)]
    with pytest.raises(ValueError, match=r"different rates, \[0\.001, 0\.01\]: give each an 'lr_scale'"):
        created(optimizers=(FusedAdamW(groups), None))
    trainer = make(Trainer, tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DeepSpeed makes optimizers of its own"):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("Trainer", r"needs transformers' Trainer .* pip install transformers accelerate"),
        ("Trainer._clip_grad_norm", r"this version of transformers does not have: use one that does"),
    ],
)
def test_without_what_it_overrides_it_says_what_to_install(
    missing: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "nexus.integrations.transformers"
    monkeypatch.delitem(sys.modules, name)
    if missing == "Trainer":
        monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))  # with nothing in it
    else:
        monkeypatch.delattr(transformers.Trainer, "_clip_grad_norm")
    with pytest.raises(ImportError, match=words):
        importlib.import_module(name)
