"""A machine where the compiled extension cannot be imported."""

from __future__ import annotations

import subprocess
import sys

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
print(optimizer.backend, param.tolist())
print(warning.category.__name__, warning.message)
try:
    FusedAdamW([param], backend="native")
except RuntimeError as error:
    print(error)
"""


def test_without_the_extension_the_reference_runs_and_says_why_once() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ran, warned, refused = result.stdout.splitlines()
    assert ran == "reference [-0.5, -0.5, -0.5]"
    assert warned.startswith("RuntimeWarning nexus runs its slow 'reference' backend")
    assert refused.startswith("backend='native' cannot run here")
    for line in (warned, refused):
        assert "the extension cannot be imported: import of nexus._native halted" in line
