"""A thousand updates of the demo's GPT in float32, beside torch's AdamW in float64: never brought together again."""

import pytest
import torch
from gpt import corpus
from gpt.model import GPT, GPTConfig
from gpt.train import BETAS, MAX_GRAD_NORM, make_optimizer, parameter_groups
from references import Float64AdamW
from torch import Tensor

from nexus.schedules import WSD

STEPS = 1000
SCHEDULE = WSD(warmup_steps=50, stable_steps=750, decay_steps=200, peak_lr=2e-3, min_lr=2e-5)
SIZE = GPTConfig(layers=2, heads=2, width=32, context=32)

# Against float64 after 1,000 updates. A parameter: absolute, in which it has moved by up to 0.7. exp_avg: relative to
# the largest of its tensor, since its terms cancel. exp_avg_sq: relative to each element. torch's own AdamW in
# float32, measured the same way, is off by 8.7e-6, 3.0e-7 and 1.3e-5.
TOLERANCES = {
    "parameter": 8e-6,  # measured 2.8e-6
    "exp_avg": 6e-7,  # measured 2.0e-7
    "exp_avg_sq": 3e-5,  # measured 1.3e-5
}


def distance(name: str, ours: Tensor, theirs: Tensor) -> float:
    difference = (ours.double() - theirs).abs()
    if name == "exp_avg":
        return float(difference.max() / theirs.abs().max())
    return float((difference / theirs if name == "exp_avg_sq" else difference).max())


@pytest.mark.slow
@pytest.mark.usefixtures("restored_threads")
def test_float32_training_follows_float64() -> None:
    torch.set_num_threads(1)  # the model is too small to share
    torch.manual_seed(0)
    text = corpus.load(torch.device("cpu"))
    model = GPT(SIZE)
    optimizer = make_optimizer(model, SCHEDULE)
    groups = parameter_groups(model)
    params = [param for group in groups for param in group["params"]]
    start = [param.detach().clone() for param in params]
    in_float64 = [{**group, "params": [param.double() for param in group["params"]]} for group in groups]
    reference = Float64AdamW(in_float64, lr=SCHEDULE, betas=BETAS, max_grad_norm=MAX_GRAD_NORM)

    for step in range(STEPS):
        optimizer.zero_grad()
        model.loss(*text.batch(seed=0, step=step, size=4, context=SIZE.context)).backward()
        reference.step([param.grad for param in params])
        optimizer.step()
        assert float(optimizer.param_groups[0]["lr"]) == SCHEDULE(step)

    worst = dict.fromkeys(TOLERANCES, 0.0)
    for index, (param, twin) in enumerate(zip(params, reference.params, strict=True)):
        ours = {"parameter": param.detach(), **optimizer.state[param]}
        theirs = {"parameter": twin.detach(), **reference.state(index)}
        for name in TOLERANCES:
            worst[name] = max(worst[name], distance(name, ours[name], theirs[name]))
        # An update that does nothing, or leaves a part of it out, is not within a tolerance of the reference.
        assert distance("parameter", start[index], theirs["parameter"]) > 1000 * TOLERANCES["parameter"]
    assert all(worst[name] < bound for name, bound in TOLERANCES.items()), worst
