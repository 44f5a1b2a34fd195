"""Real text that every machine already has: the source of the running Python's own standard library."""

from __future__ import annotations

import hashlib
import platform
import random
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt import DemoError

# Tests, generated tables and what is not part of the library itself.
SKIPPED_DIRECTORIES = frozenset(
    ["test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"]
)
HELD_OUT_ONE_IN = 20
SMALLEST_CORPUS = 500_000  # bytes; less than this is not a standard library but a stub of one


@dataclass(frozen=True)
class Corpus:
    """Two runs of bytes (uint8, on the device), from different files.

    `fingerprint` identifies both, so that a run is not continued on other text.
    """

    train: Tensor
    held_out: Tensor
    files: int
    fingerprint: str
    source: str

    def batch(self, seed: int, step: int, size: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of update `step`, each (size, context) int64: a function of its arguments alone.

        That is what lets a resumed run see the batches that an uninterrupted one would have seen.
        """
        draw = random.Random(f"nexus demo {seed} {step}")
        starts = [draw.randrange(len(self.train) - context) for _ in range(size)]
        return self._windows(self.train, starts, context)

    def held_out_batches(self, windows: int, size: int, context: int) -> list[tuple[Tensor, Tensor]]:
        """Evenly spaced windows of the held-out text, always the same ones."""
        last = len(self.held_out) - context - 1
        starts = [last * i // max(windows - 1, 1) for i in range(windows)]
        return [self._windows(self.held_out, starts[i : i + size], context) for i in range(0, windows, size)]

    @staticmethod
    def _windows(text: Tensor, starts: list[int], context: int) -> tuple[Tensor, Tensor]:
        first = torch.tensor(starts, device=text.device)[:, None]
        window = text[first + torch.arange(context + 1, device=text.device)].long()
        return window[:, :-1], window[:, 1:]


def load(device: torch.device, root: Path | None = None) -> Corpus:
    """Read every `*.py` below `root` (default: the standard library), in the order of their paths.

    A file is held out when its path says so (one in `HELD_OUT_ONE_IN` by checksum), so the split is the
    same wherever the same Python is installed.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    texts: dict[bool, list[bytes]] = {True: [], False: []}
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED_DIRECTORIES.intersection(relative.parts[:-1]):
            continue
        try:
            text = path.read_bytes()
        except OSError:
            continue
        name = relative.as_posix().encode()
        digest.update(b"%d %s\n" % (len(text), name))
        digest.update(text)
        texts[zlib.crc32(name) % HELD_OUT_ONE_IN == 0].append(text)
    train, held_out = b"".join(texts[False]), b"".join(texts[True])
    if len(train) + len(held_out) < SMALLEST_CORPUS or not held_out:
        raise DemoError(
            f"{root} holds only {len(train) + len(held_out):,} bytes of Python source, too little to train "
            f"on: run the demo with a Python that has the source of its standard library"
        )
    return Corpus(
        train=torch.frombuffer(bytearray(train), dtype=torch.uint8).to(device),
        held_out=torch.frombuffer(bytearray(held_out), dtype=torch.uint8).to(device),
        files=sum(map(len, texts.values())),
        fingerprint=digest.hexdigest(),
        source=f"the standard library of Python {platform.python_version()}",
    )
