"""What drives a training loop: schedulers, and whole steps as CUDA graphs."""

from nexus.training.capture import CapturedStep, capture_train_step

__all__ = ["CapturedStep", "capture_train_step"]
