"""A run whose rate follows the tokens it has seen, and decays of several token budgets branched off it.

Batches grow in the course of the run, and their sequences differ in length. So the number of updates says little: the
schedule is at a clock that counts tokens. What to see: the run is saved in its stable phase; each decay takes the
tokens that it was given, however many updates these are; longer ones end lower.
"""

import tempfile
import warnings
from pathlib import Path

import torch

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Clock

SYMBOLS, STABLE, DECAYS = 48, 400_000, (50_000, 100_000, 200_000, 400_000)
device = "cuda" if torch.cuda.is_available() else "cpu"
# The checkpoint's schedule has another decay_steps than a branch's. That is the point, and no reason to warn.
warnings.filterwarnings("ignore", "lr_schedule.schedule")


def batch(seed: int, sequences: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of each token the two before it, and itself: a function of these, or in one case of five any symbol."""
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(8, 64, (sequences,), generator=generator).sum())
    before = torch.randint(SYMBOLS, (tokens, 2), generator=generator)
    noise = torch.randint(SYMBOLS, (tokens,), generator=generator)
    is_noise = torch.rand(tokens, generator=generator) < 0.2
    token = torch.where(is_noise, noise, (before[:, 0] * before[:, 1] + 3 * before[:, 0]) % SYMBOLS)
    return before.to(device), token.to(device), tokens


def make(decay_tokens: int) -> tuple[torch.nn.Module, FusedAdamW, Clock]:
    """The model before training, an optimizer whose stable phase has no end yet, and the clock of its rate."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(SYMBOLS, 24), torch.nn.Flatten(), torch.nn.Linear(48, 64), torch.nn.GELU(),
        torch.nn.Linear(64, SYMBOLS),
    ).to(device)  # fmt: skip
    clock = Clock()
    schedule = WSD(warmup_steps=20_000, stable_steps=None, decay_steps=decay_tokens, peak_lr=2e-2)
    return model, FusedAdamW(model.parameters(), lr=schedule.at(clock), max_grad_norm=1.0), clock


def train(model: torch.nn.Module, optimizer: FusedAdamW, clock: Clock, until: int) -> int:
    """Train until so many tokens have been seen; returns the updates."""
    seen, updates = clock.count, 0
    while seen < until:
        before, token, tokens = batch(seed=seen + 1, sequences=16 if seen < 100_000 else 64)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(before), token).backward()
        optimizer.step()
        optimizer.advance(clock, tokens)
        seen += tokens
        updates += 1
    return updates


def held_out(model: torch.nn.Module) -> float:
    """Loss on fresh tokens, in nats."""
    before, token, _ = batch(seed=0, sequences=500)
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(before), token))


def line(run: str, tokens: int, updates: int, optimizer: FusedAdamW, loss: float) -> None:
    print(f"{run:<34} {tokens:>9,} {updates:>8} {optimizer.param_groups[0]['lr'].item():>10.1e} {loss:>14.3f}")


results = {}
with tempfile.TemporaryDirectory() as folder:
    checkpoint = Path(folder) / "stable.pt"
    model, optimizer, clock = make(decay_tokens=1)
    updates = train(model, optimizer, clock, STABLE)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    saved_at, results[0] = clock.count, held_out(model)
    print(f"{'run':<34} {'tokens':>9} {'updates':>8} {'last rate':>10} {'held-out loss':>14}")
    line("stable phase, saved", saved_at, updates, optimizer, results[0])

    for tokens in DECAYS:
        model, optimizer, clock = make(decay_tokens=tokens)
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.begin_decay()  # with the next step, at the count of the tokens so far
        updates = train(model, optimizer, clock, saved_at + tokens)
        results[tokens] = held_out(model)
        line(f"branch: decay over {tokens:,} tokens", clock.count - saved_at, updates, optimizer, results[tokens])
