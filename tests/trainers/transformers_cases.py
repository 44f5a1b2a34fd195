"""What is trained in the `Trainer` of transformers, and what is asked of it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from references import MOMENTS, Tolerance, assert_close
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    set_seed,
)

STEPS = 14  # of a run, unless its arguments say otherwise
# What float64 runs come apart by when each sees its own gradients. Measured: 1e-14 in parameters of about 1, 3e-17 in
# moments, which are below 0.1.
PARAMS = Tolerance(rtol=0, atol=4e-14)
MOMENT = Tolerance(rtol=0, atol=1e-16)


@pytest.fixture(autouse=True)
def alone(restored_threads: None) -> Iterator[None]:
    """On one thread, since others wait for each other where processors are busy; and without a trace in accelerate.

    Its state is one for all of a process, and keeps the precision that a Trainer has asked for.
    """
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_data() -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 31, (36, 8), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in tokens]


def gpt2(dtype: torch.dtype = torch.float64, seed: int = 0, width: int = 8) -> PreTrainedModel:
    """With dropout, so that a resumed run has to have the random numbers of the uninterrupted one."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 31, "n_positions": 8, "n_embd": width, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).to(dtype)


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 8}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes))


def float64_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Cross-entropy: those of transformers are computed in float32, whatever the model is."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


def train(trainer: Trainer, resume: Path | None = None) -> Trainer:
    set_seed(trainer.args.seed)  # as when it was made, for the order of the data; other models were made since then
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def unwrapped(trainer: Trainer) -> Any:
    return trainer.optimizer.optimizer


def logged(trainer: Trainer, key: str) -> list[float]:
    values = [row[key] for row in trainer.state.log_history if key in row]
    assert {type(value) for value in values} == {float}
    return values


def steps_logged(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in history if "loss" in row]


def assert_same_trained(trainer: Trainer, expected: Trainer, skipped: int = 0) -> None:
    """Parameters and moments of two float64 runs, both of which have skipped some updates."""
    pairs = list(zip(trainer.model.named_parameters(), expected.model.parameters(), strict=True))
    for (name, param), other in pairs:
        assert_close(param, other, PARAMS, name)
        mine, theirs = unwrapped(trainer).state[param], unwrapped(expected).state[other]
        assert int(mine["step"]) == int(theirs["step"]) == expected.state.global_step - skipped
        for moment in MOMENTS[:2]:
            assert_close(mine[moment], theirs[moment], MOMENT, f"{name} {moment}")
            assert theirs[moment].abs().max() > 1e-9
