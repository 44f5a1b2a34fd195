"""Schedulers of other packages, each in a process of its own: what these import and set stays there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from peers.installed import require

FOLDER = Path(__file__).parents[1] / "peers"
PACKAGES = ["timm"]


def test_each_file_is_run():
    assert [path.stem for path in sorted(FOLDER.glob("*_rates.py"))] == [f"{name}_rates" for name in PACKAGES]


@pytest.mark.parametrize("package", PACKAGES)
def test_real_schedulers_of(package):
    require(package)
    # Without the fixtures of the other tests, which take longer to import than these take to run.
    alone = ["-p", "no:cacheprovider", "-p", "no:xdist", f"--confcutdir={FOLDER}", f"--rootdir={FOLDER.parents[1]}"]
    command = [sys.executable, "-m", "pytest", "-q", *alone, str(FOLDER / f"{package}_rates.py")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parents[1], env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout
