"""What cannot be captured is refused before capture, by name and with a remedy, after a plain step."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_worlds import World, assert_same_ends, plain_step, train
from cuda_on_cpu import NAME
from graphs_on_cpu import Graphs
from references import same_bits
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from nexus.optim import FusedAdamW
from nexus.training import capture_train_step
from nexus.training.capture import device as graph_device
from nexus.training.capture.host import check_capturable
from nexus.training.schedulers import WSDScheduler

Step = Callable[..., Any]
Build = Callable[[World], Step]


@pytest.fixture(params=[NAME, "native"])
def anywhere(request: pytest.FixtureRequest, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend whose steps are captured, and one whose steps run eagerly."""
    if request.param != NAME:
        monkeypatch.setattr(graph_device, "graph_device", lambda device: None)
    return request.param


def assert_refused(
    build: Build, graphs: Graphs, match: str, error: type[Exception] = RuntimeError, backend: str = NAME
) -> World:
    """Before a capture, one of the first calls raises; each call was a plain step. Returns the captured world."""
    world = World(backend, captured=True)
    train_step = build(world)
    step, message, steps = capture_train_step(train_step, world.optimizer), "", 0
    while not message and steps < 4:
        try:
            step(*world.batch(steps))
        except error as raised:
            message = str(raised)
        steps += 1
    assert re.search(match, message), message
    assert graphs.events.count("capture") == step.graph_count == 0
    found, plain = world.state(), World(backend, captured=False)
    train_step = build(plain)
    for index in range(steps):
        train_step(*plain.batch(index))
    assert same_bits(found, plain.state())
    return world


def assert_changes_nothing(world: World, step: Step, match: str) -> None:
    """A call that raises, twice."""
    before = world.state()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match):
            step(*world.batch(1))
    assert same_bits(world.state(), before)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_step_that_raises(at: int, graphs: Graphs) -> None:
    """Its error is the user's own. A plain step leaves what a plain step leaves; a capture, the fourth, nothing."""
    error = KeyError("the very one")

    def use(world: World) -> None:
        fails = False

        def then(loss: Tensor) -> None:
            if fails:
                raise error

        step = world.step(plain_step(world, then=then))
        for index in range(6):
            if index == at and (world.captured or at < 3):
                fails = True
                with pytest.raises(KeyError) as raised:
                    step(*world.batch(index))
                assert raised.value is error
                fails = False
            if index != at or at == 3:
                step(*world.batch(index))

    assert_same_ends(use)


def test_a_capture_that_fails(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step = world.step(plain_step(world))
    train(world, step, 3)
    graphs.fail = RuntimeError("operation not permitted when stream is capturing")
    assert_changes_nothing(world, step, "operation not permitted")
    graphs.fail = None
    step(*world.batch(3))
    assert step.graph_count == 1


# What is refused after a plain step.


def reading(read: Callable[[Tensor], Any]) -> Build:
    return lambda world: plain_step(world, then=read)


def reading_in_the_backward_pass(world: World) -> Step:
    world.model[0].weight.register_hook(lambda grad: grad * float(grad.norm()))
    return plain_step(world)


def writing_a_rate(world: World) -> Step:
    lr = torch.tensor(1e-3)
    world.optimizer = FusedAdamW(world.model.parameters(), lr=lr, backend=NAME)
    return plain_step(world, then=lambda loss: lr.fill_(0.5) and None)


def setting_an_option(world: World) -> Step:
    def decay(loss: Tensor) -> None:
        group = world.optimizer.param_groups[0]
        group["weight_decay"] = 0.9 * group["weight_decay"]

    return plain_step(world, then=decay)


def stepping_torchs_scheduler(world: World) -> Step:
    world.optimizer = FusedAdamW(world.model.parameters(), lr=torch.tensor(1e-2), backend=NAME)
    scheduler = ExponentialLR(world.optimizer, 0.9)
    return plain_step(world, then=lambda loss: scheduler.step())


def stepping_a_scheduler_over_torchs_optimizer(world: World) -> Step:
    lr = torch.tensor(1e-2)
    world.optimizer = torch.optim.AdamW(world.model.parameters(), lr=lr, fused=True, capturable=True)
    scheduler = WSDScheduler(world.optimizer, warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-2)
    return plain_step(world, then=lambda loss: scheduler.step())


def moving_a_scheduler_by_number(world: World) -> Step:
    world.optimizer = FusedAdamW(world.model.parameters(), backend=NAME)
    scheduler = WSDScheduler(world.optimizer, warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-2)
    return plain_step(world, then=lambda loss: scheduler.step(3))


WAITS = rf"cannot be captured: {{}}.* \({re.escape(__file__)}:\d+\) makes the host wait .*torch.where"
READS: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda loss: loss.detach().item() and None, "aten._local_scalar_dense"),
    (lambda loss: float(loss.detach()) and None, "aten._local_scalar_dense"),
    (lambda loss: loss > 0 and None, "aten._local_scalar_dense"),
    (lambda loss: loss.reshape(1)[loss.reshape(1) > 0] * 2, "aten.index.Tensor"),
    (lambda loss: torch.nonzero(loss), "aten.nonzero"),
    (lambda loss: torch.equal(loss, loss) and None, "aten.equal"),
]
ON_THE_HOST = r"calls {}\.step\(\), which computes on the host.*after the captured step"
REFUSED: list[tuple[Build, str]] = [
    *((reading(read), WAITS.format(re.escape(operation))) for read, operation in READS),
    (reading_in_the_backward_pass, r"_local_scalar_dense.* makes the host wait"),
    (
        writing_a_rate,
        r"aten.fill_.Scalar .*test_capture_refusals.* writes a number from the host over a rate.*Schedule as lr",
    ),
    (setting_an_option, r"sets group 0's 'weight_decay' from 0\.01 .* to 0\.009.* Set it outside of the step"),
    (stepping_torchs_scheduler, ON_THE_HOST.format("ExponentialLR")),
    (stepping_a_scheduler_over_torchs_optimizer, ON_THE_HOST.format("WSDScheduler")),
    (moving_a_scheduler_by_number, "writes a number from the host"),
]


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize(("build", "match"), REFUSED, ids=lambda each: getattr(each, "__name__", ""))
def test_what_replays_would_not_repeat(build: Build, match: str, graphs: Graphs) -> None:
    assert_refused(build, graphs, match)


def test_a_parameter_without_a_gradient(graphs: Graphs) -> None:
    unused = torch.nn.Parameter(torch.ones(2))

    def build(world: World) -> Step:
        params = [*world.model.named_parameters(), ("unused", unused)]
        world.optimizer = FusedAdamW(params, backend=NAME)
        return plain_step(world)

    match = r"parameter unused of group 0 has no gradient in the warm-up.*requires_grad_\(False\)"
    world = assert_refused(build, graphs, match)
    unused.requires_grad_(False)
    step = capture_train_step(plain_step(world), world.optimizer)
    train(world, step, 4)
    assert step.graph_count == 1


def test_gradients_that_the_step_drops(graphs: Graphs) -> None:
    def build(world: World) -> Step:
        world.loss(*world.batch(5)).backward()
        return plain_step(world, clears="after")

    match = r"parameter 0 of group 0 has a gradient before the step.*zero_grad\(set_to_none=False\)"
    world = assert_refused(build, graphs, match)
    step = capture_train_step(plain_step(world, clears="after"), world.optimizer)
    train(world, step, 4)
    world.loss(*world.batch(5)).backward()
    assert_changes_nothing(world, step, match)


# What is refused before the first step.


def with_a_number_under_a_scheduler_of_torch() -> World:
    world = World(NAME, captured=True, lr=1e-2)
    CosineAnnealingLR(world.optimizer, 10)
    return world


def of_torch(optimizer: Callable[..., torch.optim.Optimizer]) -> World:
    world = World(NAME, captured=True)
    world.optimizer = optimizer(world.model.parameters(), lr=1e-2)
    return world


NO_GRAPHS = r"FusedAdamW with backend='{}' cannot be captured.*backend='cuda' or 'triton'"
NOT_CAPTURABLE = r"this {} cannot be captured.*capturable=True.*nexus\.optim\.FusedAdamW"
AT_ONCE: dict[str, tuple[Callable[[], World], str]] = {
    "a number under a scheduler of torch": (
        with_a_number_under_a_scheduler_of_torch,
        r"group 0 has the rate 0\.01 \(float\), a number, and a scheduler of torch.*Give FusedAdamW a Schedule",
    ),
    "native": (lambda: World("native", captured=True), NO_GRAPHS.format("native")),
    "torch": (lambda: World("torch", captured=True), NO_GRAPHS.format("torch")),
    "reference": (lambda: World("reference", captured=True), NO_GRAPHS.format("reference")),
    "AdamW": (lambda: of_torch(torch.optim.AdamW), NOT_CAPTURABLE.format("AdamW")),
    "SGD": (lambda: of_torch(torch.optim.SGD), NOT_CAPTURABLE.format("SGD")),
}


@pytest.mark.parametrize(("make", "match"), AT_ONCE.values(), ids=AT_ONCE)
def test_optimizers_that_no_graph_can_hold(make: Callable[[], World], match: str, graphs: Graphs) -> None:
    world = make()
    assert_changes_nothing(world, world.step(plain_step(world)), match)
    assert not graphs.events


def test_a_parameter_elsewhere() -> None:
    world = World(NAME, captured=True)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is on cpu, and others are on cuda:0"):
        check_capturable(world.optimizer, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("result", "name"),
    [
        (lambda loss: 3, r"output of the train step must be a tensor, got 3 \(int\)"),
        (lambda loss: {"loss": loss, "parts": [loss, None]}, r"output\['parts'\]\[1\] of the train step .* got None"),
        (lambda loss: (loss, "a"), r"output\[1\] of the train step must be a tensor, got 'a'"),
    ],
)
def test_outputs(result: Any, name: str, anywhere: str, graphs: Graphs) -> None:
    assert_refused(reading(result), graphs, name, TypeError, anywhere)


def test_inputs(anywhere: str) -> None:
    world = World(anywhere, captured=True)
    step = world.step(lambda *args, **kwargs: pytest.fail("the step was run"))
    x = torch.ones(2, 4)
    for args, kwargs, error, text in (
        ((x, {1, 2}), {}, TypeError, r"args\[1\] must be a tensor or hashable, got \{1, 2\} \(set\)"),
        ((), {"batch": [x, bytearray(b"")]}, TypeError, r"kwargs\['batch'\]\[1\] must be a tensor or hashable"),
        ((x.to_sparse(),), {}, TypeError, r"args\[0\] has the layout torch\.sparse_coo"),
        (([x, x.clone().requires_grad_()],), {}, ValueError, r"args\[0\]\[1\] requires a gradient.*\.detach\(\)"),
        ((x.to("meta"),), {}, ValueError, r"args\[0\] is on the meta device"),
    ):
        with pytest.raises(error, match=text):
            step(*args, **kwargs)


# At a later call.


@pytest.mark.parametrize("replays", [1, 3])
@pytest.mark.parametrize("clears", ["before", "after"])
def test_parameters_that_moved(clears: str, replays: int, graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step = world.step(plain_step(world, clears))
    train(world, step, 3 + replays)
    weight = world.model[0].weight
    weight.data = weight.data.clone()
    assert_changes_nothing(world, step, r"parameter 0 of group 0 is not where it was.*call reset\(\)")
    step.reset()
    step(*world.batch(1))


CHANGED = r"'{}' was changed from {} .* to {} .*call reset\(\)"


@pytest.mark.parametrize(
    ("is_torchs", "key", "value", "match"),
    [
        (True, "weight_decay", 0.5, CHANGED.format("weight_decay", r"0\.01", r"0\.5")),
        (False, "amsgrad", True, CHANGED.format("amsgrad", False, True)),
        (False, "exp_avg_dtype", torch.bfloat16, CHANGED.format("exp_avg_dtype", None, r"torch\.bfloat16")),
        (False, "stochastic_rounding", True, CHANGED.format("stochastic_rounding", False, True)),
        (False, "max_grad_norm", 1.0, "norm"),
    ],
)
def test_options_that_a_graph_holds(is_torchs: bool, key: str, value: Any, match: str, graphs: Graphs) -> None:
    world = World(NAME, captured=True, max_grad_norm=None)
    if is_torchs:
        world.optimizer = torch.optim.AdamW(world.model.parameters(), lr=1e-2, fused=True, capturable=True)
    step, group = world.step(plain_step(world)), world.optimizer.param_groups[0]
    train(world, step, 4)
    last, group[key] = group[key], value
    assert_changes_nothing(world, step, match)
    group[key] = last
    step(*world.batch(1))


def test_parameters_on_another_device(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step = world.step(plain_step(world))
    train(world, step, 4)
    graphs.device = torch.device("meta")  # as if they had been there
    assert_changes_nothing(world, step, r"moved to cpu, and graphs of them on meta .*call reset\(\)")
