"""The script of before.py with the `Trainer` of nexus: it makes a FusedAdamW of the same arguments.

The optimizer clips and computes its rate on the device; the checkpoints of both scripts are interchangeable.

pip install 'nexus-optim[trainers]'
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments

from nexus.integrations.transformers import Trainer

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
model = LlamaForCausalLM(config)
counting = (torch.randint(16, (512, 1)) + torch.randint(1, 5, (512, 1)) * torch.arange(12)) % 16
dataset = [{"input_ids": tokens, "labels": tokens} for tokens in counting]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=5,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=0.1,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    trainer.train()

rows = [row for row in trainer.state.log_history if "loss" in row]
losses = [row["loss"] for row in rows]
for row in rows:
    print(f"step {row['step']}: loss {row['loss']:.4f}, lr {row['learning_rate']:.2e}")
