"""The demo: a small GPT learns to write Python in two minutes, its learning rate computed by the optimizer.

The way through it: `cli` (arguments, Ctrl-C) → `run` (what identifies a run) → `corpus` and `model` →
`train` (the loop), with `progress` and `checkpoint` → `timing`, `report` and `picture` (the end).
"""
