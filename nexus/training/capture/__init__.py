"""A whole training step (forward, backward, clipping, schedule, update) as one CUDA graph."""

from nexus.training.capture.step import CapturedStep, capture_train_step

__all__ = ["CapturedStep", "capture_train_step"]
