"""The `Trainer` of transformers with a FusedAdamW that clips and evaluates its schedule itself.

Trainer makes the optimizer of its arguments, with the groups that it gives weight decay and those that it does not.
What to see: the rates in its log are those of the schedule, warm-up and decay included.

pip install 'nexus-optim[trainers]'
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments

from nexus.integrations.transformers import Trainer
from nexus.optim import FusedAdamW
from nexus.schedules import WSD

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
model = LlamaForCausalLM(config)
counting = (torch.randint(16, (512, 1)) + torch.randint(1, 5, (512, 1)) * torch.arange(12)) % 16
dataset = [{"input_ids": tokens, "labels": tokens} for tokens in counting]
schedule = WSD(warmup_steps=25, stable_steps=125, decay_steps=50, peak_lr=1e-2)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=200,
        per_device_train_batch_size=32,
        weight_decay=0.1,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    optimizer = (FusedAdamW, {"lr": schedule})  # the rest comes from the arguments
    trainer = Trainer(model, arguments, train_dataset=dataset, optimizer_cls_and_kwargs=optimizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()

rows = [row for row in trainer.state.log_history if "loss" in row]
for row in rows:
    print(f"step {row['step']}: loss {row['loss']:.3f}, norm {row['grad_norm']:.2f}, rate {row['learning_rate']:.2e}")
