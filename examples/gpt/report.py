"""What the demo prints at the end."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt.timing import StepCost
from gpt.train import Training

PROMPT = b"def "


def text(training: Training, cost: StepCost, picture: Path) -> str:
    """The report, in ASCII, so that every terminal and log shows it."""
    config = training.config
    parameters = sum(p.numel() for p in training.model.parameters())
    where = f"threads: {config.threads}" if config.device == "cpu" else torch.cuda.get_device_name()
    seen = training.step * training.bytes_a_step
    speed = seen / training.seconds if training.seconds else 0.0
    return f"""\
A GPT of {parameters / 1e6:.2f} million parameters read {seen / 1e6:.2f} MB of {training.corpus.source}
in {training.step:,} steps and {training.seconds:.0f} s ({speed:,.0f} tokens/s) on {config.device} ({where}).

  held-out text   {training.before:.3f} -> {training.after:.3f} bits per byte
  learning rate   differs from the formula by at most {training.largest_rate_difference():g}
  share of step   {cost.share(cost.nexus):6.2%}  {cost.nexus * 1e3:8.3f} ms  \
FusedAdamW ({training.optimizer.backend}): clipping, schedule and update in one
                  {cost.share(cost.torch):6.2%}  {cost.torch * 1e3:8.3f} ms  \
torch: clip_grad_norm_, AdamW(fused=True), LambdaLR
  picture         {picture}

{sample(training)}"""


def sample(training: Training) -> str:
    """Text that the model writes, behind a margin; what a terminal might obey is shown as `?`."""
    written = training.model.generate(PROMPT, training.config.size.sample_bytes, seed=training.config.seed)
    printable = "".join(chr(byte) if 32 <= byte < 127 or byte == 10 else "?" for byte in written)
    return "\n".join(f"  | {line}".rstrip() for line in printable.split("\n"))
