"""Snapshot ensembles (Huang et al. 2017, arXiv:1704.00109) with warm restarts (SGDR).

Each cosine cycle ends in a minimum of its own; a snapshot is taken there, and then the rate jumps back up. What to
see: the average of the snapshots' predictions is better on held-out data than each of the snapshots, although one
run has made them all.
"""

import torch
import torch.nn.functional as F

from nexus.optim import FusedAdamW
from nexus.schedules import CosineRestarts

CYCLES, CYCLE_LENGTH = 6, 100
device = "cuda" if torch.cuda.is_available() else "cpu"


def data(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in four dimensions and the class of each, 0 or 1; one label in twenty is wrong."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    labels = (2 * x).sin().sum(1) > 0
    wrong = torch.rand(size, generator=generator) < 0.05
    return x.to(device), (labels ^ wrong).long().to(device)


def score(probabilities: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Share of right answers, and the mean negative log-likelihood."""
    right = (probabilities.argmax(1) == labels).float().mean()
    return float(right), float(F.nll_loss(probabilities.log(), labels))


torch.manual_seed(0)
x, y = data(seed=1, size=1000)
held_out_x, held_out_y = data(seed=2, size=10_000)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 2)
).to(device)
schedule = CosineRestarts(peak_lr=3e-2, cycle_length=CYCLE_LENGTH)
optimizer = FusedAdamW(model.parameters(), lr=schedule, weight_decay=0.1)

snapshots = []  # what each predicts on the held-out points
for step in range(CYCLES * CYCLE_LENGTH):
    batch = torch.randint(len(x), (64,)).to(device)
    optimizer.zero_grad()
    F.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
    _, step_in_cycle, length = schedule.cycle(step)
    if step_in_cycle == length - 1:  # the rate is as low as it gets
        with torch.no_grad():
            snapshots.append(model(held_out_x).softmax(1))

scores = [score(snapshot, held_out_y) for snapshot in snapshots]
ensemble = score(torch.stack(snapshots).mean(0), held_out_y)
print("                     held-out accuracy   negative log-likelihood")
for number, (accuracy, loss) in enumerate(scores, 1):
    print(f"snapshot of cycle {number} {accuracy:>18.2%} {loss:>25.3f}")
print(f"average of all {CYCLES}    {ensemble[0]:>18.2%} {ensemble[1]:>25.3f}")
