"""FusedAdamW in Lightning's own Trainer: whole runs, clipping, precisions, several optimizers, the example."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_cases import (
    SCHEDULE,
    STEPS,
    WAYS,
    Batches,
    Configure,
    JsonLogger,
    Overflowing,
    Regression,
    assert_same_float64_run,
    fit,
    inside,
    optimizer_of,
    pl,
    torchs,
    trainer_in,
)
from references import Float64AdamW, assert_same_run, same_bits, snapshot
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

ROOT = Path(__file__).resolve().parents[2]

# Lightning asks torch's pytree for a class that torch 2.13 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

# The whole training run, beside torch's AdamW in the same Trainer in float64.


@pytest.mark.parametrize("configure", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.7},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
def test_a_run_is_that_of_torchs_adamw(tmp_path: Path, configure: Configure, options: dict[str, Any]) -> None:
    module = fit(tmp_path, configure, precision="64-true", **options)
    assert_same_float64_run(module, fit(tmp_path, torchs, precision="64-true", **options))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_max_grad_norm_is_the_trainers_clipping(tmp_path: Path, accumulated: int) -> None:
    options = {"precision": "64-true", "accumulate_grad_batches": accumulated}
    module = fit(tmp_path, lambda module: inside(module, max_grad_norm=0.7), **options)
    assert_same_float64_run(module, fit(tmp_path, torchs, gradient_clip_val=0.7, **options))


# Precisions: the gradients of each step, as Lightning makes them, given to the reference as well.


class Shadow(pl.Callback):
    """Steps the reference beside the optimizer, before Lightning clips; with gradients over `loss_scale`."""

    def __init__(self, loss_scale: Callable[[], float] = lambda: 1.0, **options: Any) -> None:
        self.loss_scale, self.options = loss_scale, options
        self.reference: Float64AdamW | None = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        params = list(module.parameters())
        if self.reference is None:
            self.reference = Float64AdamW(params, weight_decay=0.1, **self.options)
        grads = [param.grad.double() / self.loss_scale() for param in params]
        if all(bool(grad.isfinite().all()) for grad in grads):
            self.reference.step(grads)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_every_precision(tmp_path: Path, precision: str) -> None:
    shadow = Shadow(lr=SCHEDULE, max_grad_norm=0.7)
    module = fit(tmp_path, lambda module: inside(module, max_grad_norm=0.7), precision=precision, callbacks=[shadow])
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {param.dtype for param in module.parameters()} == {dtype}
    assert_same_run(optimizer_of(module), shadow.reference)
    assert shadow.reference.completed == STEPS


def test_a_grad_scaler_unscales_clips_and_skips_in_the_step(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    shadow = Shadow(scaler.get_scale, lr=SCHEDULE, max_grad_norm=0.7)
    module = fit(
        tmp_path,
        lambda module: inside(module, max_grad_norm=0.7),
        Overflowing,
        plugins=[pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[shadow],
    )
    optimizer = optimizer_of(module)
    assert scaler.get_scale() == 2.0**9
    assert int(optimizer.skipped_steps) == 1
    assert shadow.reference.completed == STEPS - 1
    assert_same_run(optimizer, shadow.reference)
    assert float(optimizer.param_groups[0]["lr"]) == SCHEDULE(STEPS - 2)  # a skipped step does not advance it


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_trainers_clipping_under_mixed_precision_is_refused(tmp_path: Path, precision: str) -> None:
    """By Lightning, as for torch's AdamW(fused=True); max_grad_norm is there instead."""
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    plugin = pl.plugins.precision.MixedPrecision(precision, "cpu", scaler)
    for configure in (inside, lambda module: torch.optim.AdamW(module.parameters(), fused=True)):
        with pytest.raises(RuntimeError, match="AdamW, does not allow for gradient clipping"):
            fit(tmp_path, configure, plugins=[plugin], gradient_clip_val=0.7)


# Several optimizers, and Lightning's wrappers of them.


class TwoOptimizers(pl.LightningModule):
    """Manual optimization: each net has its own optimizer, schedule and rhythm."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
        self.references = [
            Float64AdamW(list(self.first.parameters()), lr=SCHEDULE.extend_stable(3)),
            Float64AdamW(list(self.second.parameters()), lr=WSD(2, None, 4, 0.1).begin_decay(6), max_grad_norm=0.5),
        ]

    def configure_optimizers(self) -> tuple[FusedAdamW, FusedAdamW]:
        return (
            FusedAdamW(self.first.parameters(), lr=SCHEDULE),
            FusedAdamW(self.second.parameters(), lr=WSD(2, None, 4, 0.1), max_grad_norm=0.5),
        )

    def on_fit_start(self) -> None:
        first, second = self.optimizers()
        self.histories = first.history(100), second.history(100)

    def step_reference(self, index: int, net: torch.nn.Module) -> None:
        self.references[index].step([param.grad for param in net.parameters()])

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        number = self.trainer.fit_loop.total_batch_idx
        if number == 3:
            first.extend_stable(3)
        if number == 6:
            second.begin_decay()

        def closure() -> Tensor:
            first.zero_grad()
            loss = self.second(self.first(batch)).square().mean()
            self.manual_backward(loss)
            self.step_reference(0, self.first)
            return loss

        first.step(closure=closure)
        second.zero_grad()
        self.manual_backward(self.second(self.first(batch)).square().mean())
        self.step_reference(1, self.second)
        second.step()


def test_two_optimizers_in_manual_optimization(tmp_path: Path) -> None:
    module = TwoOptimizers()
    trainer_in(tmp_path, max_steps=2 * STEPS).fit(module, Batches())
    decayed = WSD(2, None, 4, 0.1).begin_decay(6)
    for index, schedule in enumerate([SCHEDULE.extend_stable(3), decayed]):
        assert_same_run(module.trainer.optimizers[index], module.references[index])
        rows = module.histories[index].read()
        assert rows.step.tolist() == list(range(STEPS))
        assert rows.lr[:, 0].tolist() == pytest.approx([schedule(t) for t in range(STEPS)], rel=1e-15)


def test_a_wrapper_that_has_loaded_and_synchronised_leaves_the_optimizer_as_it_should_be(tmp_path: Path) -> None:
    class Loading(Regression):
        wrapped = True

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            if self.global_step == 3:
                optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.sync_hyperparameters()
                optimizer.param_groups[0]["weight_decay"] = 0.9

    class LoadingItself(Loading):
        wrapped = False

    runs = [fit(tmp_path, inside, kind) for kind in (Loading, LoadingItself, Regression)]
    expected = snapshot(optimizer_of(runs[1]))
    assert same_bits(snapshot(optimizer_of(runs[0])), expected)
    assert not same_bits(snapshot(optimizer_of(runs[2])), expected)


# What users read.


def test_the_documented_module_logs_its_rates(tmp_path: Path) -> None:
    """tests/test_docs.py runs the page's code; this trains it."""
    page = (ROOT / "docs" / "trainers" / "lightning.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {"__name__": "documented"}
    exec(compile(code, "lightning.md", "exec"), found)
    logger = JsonLogger()
    monitors = [each for each in found["trainer"].callbacks if isinstance(each, pl.callbacks.LearningRateMonitor)]
    trainer = trainer_in(tmp_path, max_steps=300, logger=logger, callbacks=monitors)
    trainer.fit(found["Regression"](), Batches(features=8))
    schedule = WSD(20, 180, 100, 1e-2)
    assert logger.column("lr-FusedAdamW") == [schedule(t) for t in range(300)]


def test_the_example_prints_the_rates_of_its_schedule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restored_threads: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(1)  # busy machines are not slow with it
    found = runpy.run_path(str(ROOT / "examples" / "with_lightning.py"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    plain = runpy.run_path(str(ROOT / "examples" / "plain_torch.py"))
    losses = [float(loss.rstrip(",")) for _, _, _, loss, _, _ in lines]
    assert losses == pytest.approx(plain["losses"], rel=1e-3)  # of 300 steps, each rounded in another order
    rates = [found["schedule"](step - 1) for step in range(50, 301, 50)]
    assert found["rates"] == rates
    assert [rate for *_, rate in lines] == [f"{rate:.4f}" for rate in rates]
