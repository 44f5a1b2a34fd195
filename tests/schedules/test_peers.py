"""Schedulers of other packages, in processes of their own: what these import and set stays there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from peers.installed import require

FOLDER = Path(__file__).parents[1] / "peers"
PACKAGES = {
    "torch's": ["deepspeed", "megatron", "olmo_core", "timm", "torchtitan"],
    "others": ["keras", "optax"],
}


def test_each_file_is_run():
    named = sorted(f"{name}_rates.py" for names in PACKAGES.values() for name in names)
    assert named == sorted(path.name for path in FOLDER.glob("*_rates.py"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKAGES)
def test_real_schedulers(kind):
    for package in PACKAGES[kind]:
        require(package)
    files = [str(FOLDER / f"{package}_rates.py") for package in PACKAGES[kind]]
    # Without the fixtures of the other tests, which take longer to import than these take to run.
    alone = ["-p", "no:cacheprovider", "-p", "no:xdist", f"--confcutdir={FOLDER}", f"--rootdir={FOLDER.parents[1]}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", *alone, *files]
    run = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parents[1], env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout
