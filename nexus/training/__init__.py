"""What drives a training loop: schedulers, whole steps as CUDA graphs, updates in the backward pass, a range test."""

from nexus.training.backward import StepInBackward, step_in_backward
from nexus.training.capture import CapturedStep, capture_train_step
from nexus.training.range_test import RangeTest, find_lr

__all__ = ["CapturedStep", "RangeTest", "StepInBackward", "capture_train_step", "find_lr", "step_in_backward"]
