"""What cannot be captured is refused before capture, by name and with a remedy, and leaves everything as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from capture_worlds import World, plain_step, train
from cuda_on_cpu import NAME, shim
from graphs_on_cpu import Graphs
from references import same_bits
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.training import capture_train_step, graph_device
from nexus.training.inspection import Inspector
from nexus.training.safety import check_capturable
from nexus.training.schedulers import WSDScheduler


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Lets steps on the CPU be captured."""
    shim().reset()
    double = Graphs()
    monkeypatch.setattr(graph_device, "graph_device", lambda device: double)
    yield double
    shim().reset()


def assert_refused(
    world: World,
    train_step: Callable[..., Any],
    graphs: Graphs,
    match: str,
    error: type[BaseException] = RuntimeError,
    captures: int = 0,
) -> None:
    """The first call raises, and neither model, optimizer, gradients nor random state are another's after it."""
    before, gradients = world.state(), [param.grad for param in world.model.parameters()]
    values = world.gradients()
    keys, groups = list(world.optimizer.state), [dict(group) for group in world.optimizer.param_groups]
    step = capture_train_step(train_step, world.optimizer)
    for _ in range(2):
        with pytest.raises(error, match=match):
            step(*world.batch(0))
        assert graphs.events.count("capture") == captures
        assert same_bits(world.state(), before)
        assert all(param.grad is grad for param, grad in zip(world.model.parameters(), gradients, strict=True))
        for now, then in zip(world.gradients(), values, strict=True):
            assert (now is None and then is None) or torch.equal(now, then)
        assert list(world.optimizer.state) == keys
        for group, then in zip(world.optimizer.param_groups, groups, strict=True):
            assert group.keys() == then.keys()
            assert all(group[key] is then[key] for key in group)
        captures *= 2
    assert step.graph_count == 0


@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize("where", ["at once", "in the last run", "in capture"])
def test_a_step_that_raises(where: str, trained: int, graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    inner, runs = plain_step(world), []
    train(world, inner, trained)
    error = KeyError("the very one")

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        loss = inner(x, y)
        runs.append(1)
        if len(runs) % {"at once": 1, "in the last run": 3, "in capture": 4}[where] == 0:
            raise error
        return loss

    assert_refused(world, train_step, graphs, "the very one", KeyError, captures=int(where == "in capture"))
    losses = train(world, inner, 2)  # goes on as if nothing had been tried
    untouched = World(NAME, captured=False)
    train(untouched, plain_step(untouched), trained)
    assert same_bits(train(untouched, plain_step(untouched), 2), losses)
    assert same_bits(untouched.state(), world.state())


def test_a_capture_that_fails(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    graphs.fail = RuntimeError("operation not permitted when stream is capturing")
    assert_refused(world, plain_step(world), graphs, "operation not permitted", captures=1)


def _with(world: World, extra: Callable[[Tensor], Any]) -> Callable[..., Any]:
    inner = plain_step(world)

    def train_step(x: Tensor, y: Tensor) -> Any:
        loss = inner(x, y)
        result = extra(loss)
        return loss if result is None else result

    return train_step


@pytest.mark.parametrize(
    ("read", "operation"),
    [
        (lambda loss: loss.detach().item() and None, "aten._local_scalar_dense"),
        (lambda loss: float(loss.detach()) and None, "aten._local_scalar_dense"),
        (lambda loss: loss > 0 and None, "aten._local_scalar_dense"),
        (lambda loss: loss.reshape(1)[loss.reshape(1) > 0] * 2, "aten.index.Tensor"),
        (lambda loss: torch.nonzero(loss), "aten.nonzero"),
        (lambda loss: torch.equal(loss, loss) and None, "aten.equal"),
    ],
)
def test_what_waits_for_the_device(read: Callable[[Tensor], Any], operation: str, graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    where = rf"\({re.escape(__file__)}:\d+\)"
    match = rf"cannot be captured: {re.escape(operation)}.* {where} makes the host wait .*torch.where"
    assert_refused(world, _with(world, read), graphs, match)


def test_what_waits_in_the_backward_pass(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    hook = world.model[0].weight.register_hook(lambda grad: grad * float(grad.norm()))
    assert_refused(world, plain_step(world), graphs, r"_local_scalar_dense.* makes the host wait")
    hook.remove()


def test_a_rate_that_the_step_writes(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    lr = torch.tensor(1e-3)
    world.optimizer = FusedAdamW(world.model.parameters(), lr=lr, backend=NAME)
    match = r"aten.fill_.Scalar .*test_capture_refusals.* writes a number from the host over a rate.*Schedule as lr"
    assert_refused(world, _with(world, lambda loss: lr.fill_(0.5) and None), graphs, match)


def test_an_option_that_the_step_sets(graphs: Graphs) -> None:
    world = World(NAME, captured=True)

    def decay(loss: Tensor) -> None:
        group = world.optimizer.param_groups[0]
        group["weight_decay"] = 0.9 * group["weight_decay"]

    match = r"sets group 0's 'weight_decay' from 0\.01 .* to 0\.009.* Set it outside of the step"
    assert_refused(world, _with(world, decay), graphs, match)


def test_a_number_under_a_scheduler_of_torch(graphs: Graphs) -> None:
    world = World(NAME, captured=True, lr=1e-2)
    torch.optim.lr_scheduler.CosineAnnealingLR(world.optimizer, 10)
    match = r"group 0 has the rate 0\.01 \(float\), a number, and a scheduler of torch.*Give FusedAdamW a Schedule"
    assert_refused(world, plain_step(world), graphs, match)


@pytest.mark.parametrize("kind", ["torch", "nexus"])
def test_a_scheduler_that_computes_on_the_host_in_the_step(kind: str, graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    lr = torch.tensor(1e-2)
    if kind == "torch":
        world.optimizer = FusedAdamW(world.model.parameters(), lr=lr, backend=NAME)
        scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(world.optimizer, 0.9)
    else:
        world.optimizer = torch.optim.AdamW(world.model.parameters(), lr=lr, fused=True, capturable=True)
        scheduler = WSDScheduler(world.optimizer, 3, 4, 5, 1e-2)
    before = dict(vars(scheduler))
    match = rf"calls {type(scheduler).__name__}\.step\(\), which computes on the host.*after the captured step"
    assert_refused(world, _with(world, lambda loss: scheduler.step()), graphs, match)
    assert vars(scheduler) == before


def test_a_scheduler_moved_to_a_step_by_number(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    world.optimizer = FusedAdamW(world.model.parameters(), backend=NAME)
    scheduler = WSDScheduler(world.optimizer, 3, 4, 5, 1e-2)
    with pytest.warns(UserWarning, match="epoch parameter"):
        assert_refused(world, _with(world, lambda loss: scheduler.step(3)), graphs, "writes a number from the host")
    assert scheduler.last_epoch == scheduler._device_rates.counted == 0


def test_a_parameter_without_a_gradient(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    params = [*world.model.named_parameters(), ("unused", torch.nn.Parameter(torch.ones(2)))]
    world.optimizer = FusedAdamW(params, backend=NAME)
    match = r"parameter unused of group 0 has no gradient in the warm-up.*requires_grad_\(False\)"
    assert_refused(world, plain_step(world), graphs, match)
    params[-1][1].requires_grad_(False)
    capture_train_step(plain_step(world), world.optimizer)(*world.batch(0))


def test_gradients_that_the_step_drops(graphs: Graphs) -> None:
    world = World(NAME, captured=True)

    def update(x: Tensor, y: Tensor) -> Tensor:
        loss = world.loss(x, y)
        loss.backward()
        world.optimizer.step()
        world.optimizer.zero_grad()
        return loss

    world.loss(*world.batch(5)).backward()
    match = r"parameter 0 of group 0 has a gradient before the step.*zero_grad\(set_to_none=False\)"
    assert_refused(world, update, graphs, match)
    world.optimizer.zero_grad()
    step = capture_train_step(update, world.optimizer)
    step(*world.batch(0))
    world.loss(*world.batch(5)).backward()
    before = world.state()
    with pytest.raises(RuntimeError, match=match):
        step(*world.batch(1))
    assert same_bits(world.state(), before)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_backends_without_graphs(backend: str, graphs: Graphs) -> None:
    world = World(backend, captured=True)
    match = rf"FusedAdamW with backend='{backend}' cannot be captured.*backend='cuda' or 'triton'"
    assert_refused(world, plain_step(world), graphs, match)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_that_are_not_capturable(optimizer: Any, graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    world.optimizer = optimizer(world.model.parameters(), lr=1e-2)
    match = rf"this {optimizer.__name__} cannot be captured.*capturable=True.*nexus\.optim\.FusedAdamW"
    assert_refused(world, plain_step(world), graphs, match)


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
@pytest.mark.parametrize("eager", [False, True])
def test_outputs(result: Any, name: str, eager: bool, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    if eager:
        monkeypatch.setattr(graph_device, "graph_device", lambda device: None)
        world = World("native", captured=True)
        with pytest.raises(TypeError, match=name):
            world.step(_with(world, result))(*world.batch(0))
        return
    world = World(NAME, captured=True)
    assert_refused(world, _with(world, result), graphs, name, TypeError)


@pytest.mark.parametrize("backend", ["native", NAME])
def test_inputs(backend: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native":
        monkeypatch.setattr(graph_device, "graph_device", lambda device: None)
    world = World(backend, captured=True)
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


def test_parameters_that_moved(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step = world.step(plain_step(world))
    step(*world.batch(0))
    weight = world.model[0].weight
    weight.data = weight.data.clone()
    before = world.state()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 is not where it was.*call reset\(\)"):
        step(*world.batch(1))
    assert same_bits(world.state(), before)
    step.reset()
    step(*world.batch(1))


def test_numbers_that_a_graph_of_torchs_optimizer_holds(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    world.optimizer = torch.optim.AdamW(world.model.parameters(), lr=1e-2, fused=True, capturable=True)
    step = world.step(plain_step(world))
    step(*world.batch(0))
    world.optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(RuntimeError, match=r"'weight_decay' was changed from 0\.01 .* to 0\.5 .*call reset\(\)"):
        step(*world.batch(1))
    world.optimizer.param_groups[0]["weight_decay"] = 1e-2
    step(*world.batch(1))


def test_what_a_graph_of_fused_adamw_cannot_follow(graphs: Graphs) -> None:
    world = World(NAME, captured=True, max_grad_norm=None)
    step, group = world.step(plain_step(world)), world.optimizer.param_groups[0]
    step(*world.batch(0))
    for key, value, match in (
        ("amsgrad", True, r"'amsgrad' was changed from False .* to True .*call reset\(\)"),
        ("max_grad_norm", 1.0, "norm"),
    ):
        last, group[key] = group[key], value
        before = world.state()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=match):
                step(*world.batch(1))
        assert same_bits(world.state(), before)
        group[key] = last
        step(*world.batch(1))


def test_parameters_on_another_device(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step = world.step(plain_step(world))
    step(*world.batch(0))
    graphs.device = torch.device("meta")  # as if they had been there
    with pytest.raises(RuntimeError, match=r"moved to cpu, and graphs of them on meta .*call reset\(\)"):
        step(*world.batch(1))


# What is seen of a step on another device than the CPU: on the meta device, which runs nothing.


def refusal(function: Callable[[], Any]) -> str | None:
    inspector = Inspector(torch.device("meta"), [])
    inspector.check()
    with inspector:
        function()
    return inspector.refusal


ON_DEVICE = torch.ones(3, device="meta")
ON_CPU, FACTOR = torch.ones(3), torch.tensor(0.9)


@pytest.mark.parametrize(
    "function",
    [
        lambda: ON_DEVICE * ON_CPU.to("meta"),
        lambda: ON_DEVICE.copy_(ON_CPU),
        lambda: ON_DEVICE.copy_(torch.tensor(2.0)),
        lambda: ON_DEVICE * torch.tensor(2.0).to("meta"),
        lambda: torch.empty_like(ON_DEVICE.sum(), device="cpu"),  # as loss.cpu() makes one
        lambda: ON_DEVICE * FACTOR,
        lambda: torch.zeros(3) + 1,
        lambda: torch.randn(3),
        lambda: ON_CPU.add_(1),
    ],
)
def test_a_cpu_tensor_in_the_step(function: Callable[[], Any]) -> None:
    found = refusal(function)
    assert found is not None
    assert re.search(r"aten\.\S+ \(.*test_capture_refusals\.py:\d+\) uses a tensor of shape \(.*\) on cpu", found)
    assert "make it there (device='meta')" in found


@pytest.mark.parametrize(
    "function",
    [
        lambda: ON_DEVICE * 2.0 + 1,
        lambda: ON_DEVICE * torch.tensor(2.0),
        lambda: ON_DEVICE.clone().fill_(3.0),
        lambda: torch.full((3,), 2.0, device="meta") * torch.arange(3, device="meta"),
        lambda: ON_DEVICE[torch.tensor(2.0).int().item() :],
        lambda: ON_DEVICE.index_select(0, torch.zeros(1, dtype=torch.int64, device="meta")),
        lambda: ON_DEVICE[torch.zeros(1, dtype=torch.int64, device="meta")],
        lambda: torch.nn.functional.dropout(ON_DEVICE, 0.5),
    ],
)
def test_constants_may_be_made_in_the_step(function: Callable[[], Any]) -> None:
    assert refusal(function) is None


def test_a_tensor_made_of_numbers_of_the_host() -> None:
    # What torch.tensor(..., device=...) ends in. (On the meta device it does nothing.)
    found = refusal(lambda: ON_DEVICE + torch.ops.aten.lift_fresh(ON_DEVICE))
    assert found is not None
    assert "makes a tensor on the device from numbers of the host" in found
    assert "torch.full" in found
