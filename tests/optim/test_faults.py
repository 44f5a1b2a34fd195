"""What goes wrong in long runs: nothing is lost, nothing stale is written, nothing hangs."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from references import (
    assert_same_run,
    backward_both,
    copies,
    make_grads,
    make_params,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine

SPOILED = (torch.inf, -torch.inf, torch.nan)


@pytest.mark.parametrize("clip", [None, 0.7])
def test_a_thousand_steps_of_which_some_are_not_finite(backend: str, clip: float | None) -> None:
    steps = 1000 if backend in ("native", "cuda") else 250  # the others do in a second what these do in a moment
    dice = random.Random(17)
    start = [*make_params([(), (7,), (33, 5)]), *make_params([(12,)], torch.bfloat16)]
    options: dict[str, Any] = {
        "lr": WSD(warmup_steps=50, stable_steps=300, decay_steps=300, peak_lr=1e-2, min_lr=1e-4),
        "weight_decay": Cosine(peak_lr=0.1, total_steps=700),
        "amsgrad": True,
        "max_grad_norm": clip,
        "skip_nonfinite": True,
        "backend": backend,
    }
    spoiled, clean = FusedAdamW(copies(start), **options), FusedAdamW(copies(start), **options)
    history, expected = spoiled.history(steps), clean.history(steps)
    skipped = 0
    for step in range(steps):
        grads: list[Tensor | None] = list(make_grads(start))
        grads[dice.randrange(4)] = None
        spoils = dice.random() < (0.9 if step // 50 % 5 == 4 else 0.1)  # also many in a row
        if spoils:
            victim = dice.choice([grad for grad in grads if grad is not None])
            victim.view(-1)[dice.randrange(victim.numel())] = dice.choice(SPOILED)
            skipped += 1
        for optimizer in (spoiled, clean)[: 1 if spoils else 2]:
            set_grads(optimizer.param_groups[0]["params"], grads)
            optimizer.step()
    assert steps // 10 < skipped < steps // 2
    assert same_bits(snapshot(spoiled), snapshot(clean))
    assert (int(spoiled.skipped_steps), int(clean.skipped_steps)) == (skipped, 0)
    saved = [each.state_dict()["param_groups"] for each in (spoiled, clean)]
    assert saved[0] == saved[1]
    assert saved[0][0]["lr_schedule"]["step"] == steps - skipped
    rows, expected_rows = history.read(), expected.read()
    assert int(rows.skipped.sum()) == skipped
    for name in ("step", "lr", "grad_norm"):
        assert torch.equal(getattr(rows, name)[~rows.skipped], getattr(expected_rows, name))


def test_a_parameter_frozen_and_unfrozen_in_mid_run(backend: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    params = list(module.parameters())
    optimizer, reference = run_beside_torch(params, backend, steps=0)
    for trains in (True, False, True):
        module[0].requires_grad_(trains)
        before = copies(module[0].parameters())
        backward_both(optimizer, reference, lambda: module(torch.randn(5, 3)).square().sum())
        assert same_bits(before, list(module[0].parameters())) != trains
    assert [int(optimizer.state[param]["step"]) for param in params] == [6, 6, 9, 9]
    assert_same_run(optimizer, reference)


# Exceptions of the user's own.


def raising(*_: Any) -> None:
    raise KeyError("in a hook")


@pytest.mark.parametrize("where", ["pre_hook", "post_hook", "closure"])
def test_an_exception_around_the_update_leaves_it_made_once_or_not_at_all(backend: str, where: str) -> None:
    params = make_params([(5,), (3, 2)])
    optimizer, reference = run_beside_torch(
        params, backend, lr=Cosine(peak_lr=0.1, total_steps=20), max_grad_norm=1.0
    )
    before, grads = snapshot(optimizer), make_grads(params)
    set_grads(params, grads)
    handle = None if where == "closure" else getattr(optimizer, f"register_step_{where}")(raising)
    with pytest.raises(KeyError, match="in a hook"):
        optimizer.step(raising if handle is None else None)
    if where == "post_hook":
        reference.step(grads)
    else:
        assert same_bits(before, snapshot(optimizer))
    if handle is not None:
        handle.remove()
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


def test_an_exception_in_a_backward_pass_leaves_the_other_gradients(backend: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    params = list(module.parameters())
    optimizer, reference = run_beside_torch(params, backend, steps=0)
    for _ in range(3):
        backward_both(optimizer, reference, lambda: module(torch.randn(5, 3)).square().sum(), steps=1)
        optimizer.zero_grad()
        handle = module[0].weight.register_hook(raising)
        with pytest.raises(KeyError, match="in a hook"):
            module(torch.randn(5, 3)).square().sum().backward()
        handle.remove()
        assert module[0].weight.grad is None
        reference.step([param.grad for param in params])
        optimizer.step()  # with what there is
    assert int(optimizer.state[module[0].weight]["step"]) == 3
    assert_same_run(optimizer, reference)


def test_a_hook_of_a_state_dict_that_fails_changes_nothing(backend: str) -> None:
    params = make_params([(5,)])
    optimizer, _ = run_beside_torch(params, backend)
    saved = optimizer.state_dict()
    other = FusedAdamW(copies(params), backend=backend)
    before = snapshot(other)
    handle = other.register_load_state_dict_pre_hook(raising)
    with pytest.raises(KeyError, match="in a hook"):
        other.load_state_dict(saved)
    assert same_bits(before, snapshot(other))
    assert other.param_groups[0]["lr"] == 1e-3
    handle.remove()
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 1e-2


# A process that is killed while it saves, as docs/optimizer.md shows it. What nexus has to do with it: a state dict
# that loads is a whole one, and a run that goes on from it is the run that was not killed.

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizer.md"
STEPS = 20
FILE = 1_087_000  # bytes: three times 300 x 301 numbers of float32, and less than 4 KB of names


def train_until(stop: int, path: Path, limit: int = 0) -> None:
    """A run that goes on from a file, saves after each step, and is killed at byte `limit` of the last save."""
    (source,) = re.findall(r"^def save\(.*?(?=^\n\n)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"os": os, "torch": torch}
    exec(source, names)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    optimizer = FusedAdamW(
        model.parameters(), lr=WSD(warmup_steps=5, stable_steps=10, decay_steps=10, peak_lr=1e-3), max_grad_norm=1.0
    )
    step = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    for done in range(step + 1, stop + 1):
        torch.manual_seed(done)
        set_grads(list(model.parameters()), make_grads(list(model.parameters())))
        optimizer.step()
        if done == stop and limit:  # the kernel ends the process in the write of this byte of a file
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        names["save"]({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, path)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.skipif(os.name != "posix", reason="needs a limit of the size of files")
def test_a_run_that_is_killed_while_saving_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    train_until(STEPS, whole)
    assert abs(whole.stat().st_size - FILE) < 4096
    for stop, limit in ((6, FILE // 2), (14, FILE - 4096)):
        process = multiprocessing.get_context("fork").Process(target=train_until, args=(stop, killed, limit))
        process.start()
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGXFSZ
        assert Path(f"{killed}.new").stat().st_size == limit
        assert torch.load(killed, weights_only=True)["step"] == stop - 1
    train_until(STEPS, killed)
    first, second = (torch.load(path, weights_only=True) for path in (whole, killed))
    assert first["step"] == second["step"] == STEPS
    groups = [saved["optimizer"].pop("param_groups") for saved in (first, second)]
    assert groups[0] == groups[1]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
