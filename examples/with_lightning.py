"""Lightning's Trainer with FusedAdamW: `configure_optimizers` returns the optimizer, and no scheduler.

Schedule and clipping are part of the optimizer's step, so the Trainer has no gradient_clip_val. What to see: the
losses are those of plain_torch.py, and beside each is the rate that its step has used, as Lightning logs it.

pip install 'nexus-optim[trainers]'
"""

import logging
from collections.abc import Iterator

import lightning.pytorch as pl
import torch

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

device = "cuda" if torch.cuda.is_available() else "cpu"
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
schedule = WSD(warmup_steps=20, stable_steps=180, decay_steps=100, peak_lr=1e-2)


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))

    def configure_optimizers(self) -> FusedAdamW:
        return FusedAdamW(self.parameters(), lr=schedule, weight_decay=0.01, max_grad_norm=1.0)

    def training_step(self, x: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.net(x) - x.sin().sum(1, keepdim=True)).square().mean()

    def on_train_batch_end(self, outputs: dict, *args: object) -> None:
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        if self.global_step % 50 == 0:
            rates.append(self.trainer.callback_metrics["lr"].item())
            print(f"step {self.global_step}: loss {outputs['loss'].item():.4f}, rate {rates[-1]:.4f}")


class Batches:
    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.randn(256, 8) for _ in range(300))


torch.manual_seed(0)
rates: list[float] = []
quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
trainer = pl.Trainer(accelerator=device, devices=1, max_epochs=1, **quiet)
trainer.fit(Regression(), Batches())
