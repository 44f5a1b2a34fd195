"""FusedAdamW in the `Trainer` of transformers: with a scheduler of nexus, with Trainer's, with a schedule inside."""

from __future__ import annotations

import functools
import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from low_memory_cases import IN_TRAINERS, stored_dtypes
from references import Float64AdamW, assert_same_run, same_bits, snapshot
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine, Schedule
from nexus.training.schedulers import CosineAnnealingScheduler, FollowingScheduler, WSDScheduler

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported
pytest.importorskip("transformers")

from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers_cases import (
    STEPS,
    alone,  # noqa: F401  # a fixture
    assert_same_trained,
    float64_loss,
    gpt2,
    llama,
    logged,
    make_data,
    steps_logged,
    train,
    unwrapped,
)

SCHEDULE = WSD(warmup_steps=3, stable_steps=6, decay_steps=4, peak_lr=1e-2, min_lr=1e-4, decay_type="sqrt")
COSINE = Cosine(peak_lr=1e-2, total_steps=12, min_lr=1e-4, warmup_steps=3)


def make_trainer(
    model: PreTrainedModel,
    folder: Path,
    optimizer: tuple[type[Optimizer], dict[str, Any]] | Optimizer,
    attach: Callable[[Optimizer], Any] | None,
    *,
    callbacks: list[TrainerCallback] | None = None,
    compute_loss: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer whose optimizer has Trainer's groups, if it is not given whole.

    It has the scheduler that `attach` makes for the optimizer, or Trainer's own.
    """
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    whole = isinstance(optimizer, Optimizer)
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **options}),
        train_dataset=make_data(),
        compute_loss_func=compute_loss,
        callbacks=callbacks,
        **({"optimizers": (optimizer, attach(optimizer))} if whole else {"optimizer_cls_and_kwargs": optimizer}),
    )
    if attach is not None and not whole:
        trainer.lr_scheduler = attach(trainer.create_optimizer())
    return trainer


make_wsd = functools.partial(
    WSDScheduler, warmup_steps=3, stable_steps=6, decay_steps=4, peak_lr=1e-2, min_lr=1e-4, decay_type="sqrt"
)
make_cosine = functools.partial(CosineAnnealingScheduler, warmup_steps=3, total_steps=12, peak_lr=1e-2, min_lr=1e-4)

# The rate given to FusedAdamW, what makes its scheduler, and the oracle; None for Trainer's own scheduler.
WAYS: dict[str, tuple[float | Schedule, Callable[[Any], Any] | None, Schedule | None]] = {
    "WSDScheduler": (1e-3, make_wsd, SCHEDULE),
    "CosineAnnealingScheduler": (1e-3, make_cosine, COSINE),
    "Trainer's scheduler": (1e-2, None, None),
    "WSD inside": (SCHEDULE, FollowingScheduler, SCHEDULE),
    "Cosine inside": (COSINE, FollowingScheduler, COSINE),
}
each_way = pytest.mark.parametrize("way", WAYS)

SAVING = {"save_strategy": "steps", "save_steps": 8}  # in the middle of an epoch, which is 6 updates
CLIPPING = {"clip": 0.5, "max_grad_norm": 0.0}  # in the optimizer, and not by Trainer


def fused_trainer(
    way: str, model: PreTrainedModel, folder: Path, clip: float | None = None, **options: Any
) -> Trainer:
    lr, attach, _ = WAYS[way]
    return make_trainer(model, folder, (FusedAdamW, {"lr": lr, "max_grad_norm": clip}), attach, **options)


@pytest.fixture(scope="module")
def torchs_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Schedule | None], Trainer]:
    """What torch's AdamW has trained at the rates of an oracle, or of Trainer's scheduler; made once for each."""

    @functools.cache
    def run(oracle: Schedule | None) -> Trainer:
        plain = {"foreach": False, "fused": False, "lr": 1e-2 if oracle is None else 1.0}
        attach = None if oracle is None else lambda optimizer: LambdaLR(optimizer, oracle)
        folder = tmp_path_factory.mktemp("torch")
        given = (torch.optim.AdamW, plain)
        return train(make_trainer(gpt2(), folder, given, attach, compute_loss=float64_loss, **SAVING))

    return run


@pytest.mark.parametrize("clips", ["Trainer", "FusedAdamW"])
@each_way
def test_a_run_is_that_of_torchs_adamw(way: str, clips: str, tmp_path: Path, torchs_run: Any) -> None:
    own, oracle = CLIPPING if clips == "FusedAdamW" else {}, WAYS[way][2]
    trainer = train(fused_trainer(way, gpt2(), tmp_path, compute_loss=float64_loss, **own))
    expected = torchs_run(oracle)

    assert_same_trained(trainer, expected)
    assert [group["weight_decay"] for group in unwrapped(trainer).param_groups] == [0.1, 0.0]
    norms = logged(trainer, "grad_norm")
    assert norms == pytest.approx(logged(expected, "grad_norm"), rel=1e-12)
    assert sum(norm > 0.5 for norm in norms) > STEPS / 2  # clipping has had something to do
    rates = logged(trainer, "learning_rate")
    assert rates == (logged(expected, "learning_rate") if oracle is None else oracle.values(0, STEPS))
    assert len(set(rates)) > 5


class Beside(TrainerCallback):
    """Steps the float64 reference with the gradients that Trainer's optimizer is about to see."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        groups = [{name: group[name] for name in ("params", "weight_decay")} for group in optimizer.param_groups]
        self.params = [param for group in groups for param in group["params"]]
        self.reference = Float64AdamW(groups, **self.options)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.reference.step([param.grad for param in self.params])


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][2]])
def test_updates_of_llama_are_those_of_float64_torch(way: str, bf16: bool, tmp_path: Path) -> None:
    model, oracle = llama(), WAYS[way][2]
    beside = Beside(lr=oracle, max_grad_norm=0.5)
    trainer = fused_trainer(way, model, tmp_path, callbacks=[beside], bf16=bf16, **CLIPPING)
    computed_in = set()
    model.model.layers[0].mlp.register_forward_hook(lambda *given: computed_in.add(given[2].dtype))
    trainer.train()

    assert computed_in == {torch.bfloat16 if bf16 else torch.float32}
    assert beside.reference.completed == STEPS
    assert_same_run(unwrapped(trainer), beside.reference, way)
    assert logged(trainer, "learning_rate") == oracle.values(0, STEPS)
    assert float(unwrapped(trainer).grad_norm) == pytest.approx(logged(trainer, "grad_norm")[-1], rel=1e-6)


@each_way
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(way: str, tmp_path: Path) -> None:
    first = train(fused_trainer(way, gpt2(torch.float32), tmp_path, **SAVING, **CLIPPING))
    second = fused_trainer(way, gpt2(torch.float32, seed=1), tmp_path / "second", **SAVING, **CLIPPING)
    train(second, tmp_path / "checkpoint-8")

    assert second.state.global_step == STEPS
    assert same_bits(snapshot(unwrapped(second)), snapshot(unwrapped(first)))
    assert steps_logged(second.state.log_history) == steps_logged(first.state.log_history)
    for folder in (tmp_path, tmp_path / "second"):
        saved = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text("utf-8"))
        assert steps_logged(saved["log_history"]) == steps_logged(first.state.log_history)


@pytest.mark.parametrize(("dtype", "options"), IN_TRAINERS)
def test_low_memory_state_is_resumed_bit_for_bit(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    def make(folder: Path, seed: int) -> Trainer:
        optimizer = (FusedAdamW, {"lr": SCHEDULE, **options})
        model = gpt2(dtype, seed, width=32)  # of which some tensors are large enough for fewer bits
        return make_trainer(model, folder, optimizer, FollowingScheduler, bf16=dtype == torch.float32, **SAVING)

    first, second = make(tmp_path, 0), make(tmp_path / "second", 1)
    train(first)
    train(second, tmp_path / "checkpoint-8")
    expected = snapshot(unwrapped(first))
    assert {each.dtype for each in expected} >= {dtype, *stored_dtypes(options)}
    assert same_bits(snapshot(unwrapped(second)), expected)


@pytest.mark.parametrize("way", ["WSD inside", "Trainer's scheduler"])
def test_a_run_that_torchs_adamw_began_goes_on(way: str, tmp_path: Path, torchs_run: Any) -> None:
    whole = torchs_run(WAYS[way][2])
    resumed = fused_trainer(way, gpt2(seed=1), tmp_path, compute_loss=float64_loss)
    train(resumed, Path(whole.args.output_dir) / "checkpoint-8")
    assert_same_trained(resumed, whole)
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")


@pytest.mark.parametrize("way", ["WSD inside", "WSDScheduler"])
def test_an_optimizer_made_by_hand_is_taken(way: str, tmp_path: Path, torchs_run: Any) -> None:
    (lr, attach, oracle), model = WAYS[way], gpt2()
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    trainer = train(make_trainer(model, tmp_path, FusedAdamW(groups, lr=lr), attach, compute_loss=float64_loss))
    assert_same_trained(trainer, torchs_run(oracle))
    assert logged(trainer, "learning_rate") == oracle.values(0, STEPS)


# A schedule inside the optimizer.


def test_trainers_own_scheduler_is_refused_with_the_remedy(tmp_path: Path) -> None:
    trainer = make_trainer(llama(), tmp_path, (FusedAdamW, {"lr": SCHEDULE}), None)
    before = snapshot(trainer.create_optimizer())
    with pytest.raises(RuntimeError, match=r"its own schedule, WSD\(.*FollowingScheduler\(optimizer\)"):
        trainer.train()
    assert same_bits(snapshot(unwrapped(trainer)), before)


def test_a_decay_that_a_callback_begins_is_logged(tmp_path: Path) -> None:
    schedule = WSD(warmup_steps=3, stable_steps=None, decay_steps=4, peak_lr=1e-2)

    class Decay(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, optimizer: Any, **__: Any) -> None:
            if state.global_step == 6:
                optimizer.optimizer.begin_decay()

    trainer = make_trainer(llama(), tmp_path, (FusedAdamW, {"lr": schedule}), FollowingScheduler, callbacks=[Decay()])
    trainer.train()
    assert logged(trainer, "learning_rate") == schedule.begin_decay(6).values(0, STEPS)


@pytest.mark.parametrize("way", ["WSD inside", "WSDScheduler"])
def test_a_schedule_inside_waits_for_a_skipped_update_and_a_scheduler_does_not(way: str, tmp_path: Path) -> None:
    calls = 0

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return float64_loss(outputs, labels, num_items_in_batch) * (torch.inf if calls == 5 else 1.0)

    lr, attach, _ = WAYS[way]
    optimizer = (FusedAdamW, {"lr": lr, "skip_nonfinite": True})
    trainer = make_trainer(gpt2(), tmp_path, optimizer, attach, compute_loss=loss, gradient_accumulation_steps=1)
    trainer.train()
    assert unwrapped(trainer).skipped_steps.item() == 1
    used = SCHEDULE.values(0, STEPS)
    assert logged(trainer, "learning_rate") == (used if way == "WSDScheduler" else [*used[:5], *used[4:-1]])


def test_a_following_scheduler_reports_and_drives_nothing() -> None:
    weight, scaled = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = FusedAdamW([{"params": [weight]}, {"params": [scaled], "lr_scale": 0.5}], lr=SCHEDULE)
    keys = set(optimizer.param_groups[0])
    scheduler = FollowingScheduler(optimizer)
    assert "step" not in vars(optimizer)  # others wrap it
    for step in range(STEPS):
        weight.grad = scaled.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [SCHEDULE(step), 0.5 * SCHEDULE(step)]
    assert set(optimizer.param_groups[0]) == keys
    for group in optimizer.param_groups:
        group["lr"] = COSINE  # takes over at the next step
    assert scheduler.get_last_lr() == [COSINE(STEPS), 0.5 * COSINE(STEPS)]
    other = FollowingScheduler(optimizer)
    other.load_state_dict(scheduler.state_dict())
    assert other.last_epoch == scheduler.last_epoch == 2 * STEPS


def test_a_following_scheduler_needs_a_schedule_to_follow() -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match=r"must be a nexus\.optim\.FusedAdamW, got .*SGD"):
        FollowingScheduler(torch.optim.SGD(params))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has a schedule to follow: give it one as lr"):
        FollowingScheduler(FusedAdamW(params, lr=1e-3, weight_decay=COSINE))


# The example.


def test_the_example_logs_the_rates_of_its_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "with_transformers.py"
    assert path.read_text("utf-8").count("\n") < 50
    found = runpy.run_path(str(path))
    rows, schedule = found["rows"], found["schedule"]
    assert [row["learning_rate"] for row in rows] == [schedule(row["step"] - 1) for row in rows]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.rsplit(" ", 1)[1] for line in printed] == [f"{row['learning_rate']:.2e}" for row in rows]
