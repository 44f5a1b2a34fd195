"""What drives a training loop: schedulers, whole steps as CUDA graphs, updates in the backward pass."""

from nexus.training.backward import StepInBackward, step_in_backward
from nexus.training.capture import CapturedStep, capture_train_step

__all__ = ["CapturedStep", "StepInBackward", "capture_train_step", "step_in_backward"]
