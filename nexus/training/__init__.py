"""What drives a training loop: schedulers."""
