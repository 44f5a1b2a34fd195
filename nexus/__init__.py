"""nexus: a fused AdamW for PyTorch that computes its own learning-rate schedule on the device.

Start with ``nexus.optim.FusedAdamW`` and ``nexus.schedules``. Importing ``nexus`` alone loads no torch.
"""

__version__ = "0.1.0"
