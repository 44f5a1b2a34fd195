"""A machine where the compiled extension cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nexus.backends import extension

WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["nexus._native"] = None  # an import of it fails
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import nexus.optim
    from nexus.optim import FusedAdamW
    import torch
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = FusedAdamW([param], lr=0.5, weight_decay=0.0)
    optimizer.step()
    FusedAdamW([param], backend="reference")
(warning,) = caught
print(optimizer.backend, [round(value, 6) for value in param.tolist()])
print(warning.category.__name__, warning.message)
try:
    FusedAdamW([param], backend="native")
except RuntimeError as error:
    print(error)
"""


def test_without_the_extension_torchs_own_kernel_runs_and_nexus_says_why_once() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ran, warned, refused = result.stdout.splitlines()
    assert ran == "torch [-0.5, -0.5, -0.5]"
    assert warned.startswith("RuntimeWarning nexus runs in plain PyTorch (backend 'torch')")
    assert refused.startswith("backend='native' cannot run here")
    for line in (warned, refused):
        assert "the extension cannot be imported: import of nexus._native halted" in line


@pytest.mark.parametrize(("in_clone", "what"), [(False, "nexus-optim"), (True, "-e {}")])
def test_the_remedy_installs_what_pip_has_not_kept(
    in_clone: bool, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "nexus"
    package.mkdir()
    (package / "_native_build_failure.txt").write_text("no working C++ compiler: set CXX.\n")
    if in_clone:
        (tmp_path / "setup.py").touch()
    monkeypatch.setattr(extension, "extension", None)
    monkeypatch.setattr(extension, "__file__", str(package / "backends" / "extension.py"))
    reason = extension.unavailable()
    assert reason is not None
    assert reason.startswith("the extension was not built: no working C++ compiler: set CXX. With a C++ compiler")
    assert f"run 'pip install --no-cache-dir --force-reinstall --no-deps {what.format(tmp_path)}'" in reason
