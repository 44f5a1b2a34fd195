"""What a step of the optimizer costs beside torch's and others': `python -m benchmarks`, in a clone."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # of which gpt is trained here, too
