"""One graph of a train step, and what has to be right around each of its replays."""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nexus.arguments import shown
from nexus.backends.sharding import local
from nexus.optim import FusedAdamW
from nexus.optim.engine import attributes_of, engine_of
from nexus.optim.parameters import named_parameters
from nexus.optim.settings import STATE_OPTIONS, in_state
from nexus.training.capture.device import Graph
from nexus.training.capture.gradients import Gradients
from nexus.training.capture.signature import Outputs
from nexus.training.schedulers import ScheduleLR


class CapturedGraph:
    """A graph with its inputs, outputs and gradients.

    Args:
        graph: that was captured.
        optimizer: whose step is in it.
        tables: what this step reads.
        inputs: where the graph finds its inputs.
        outputs: where it leaves its outputs.
        gradients: what it does with gradients.
        advances: schedulers that it steps, and how often at each replay.
    """

    def __init__(
        self,
        graph: Graph,
        optimizer: Optimizer,
        tables: list[object],
        inputs: list[Tensor],
        outputs: Outputs,
        gradients: Gradients,
        advances: dict[ScheduleLR[Any], int],
    ) -> None:
        self._graph = graph
        self._optimizer = optimizer
        self._tables = tables
        self._inputs = inputs
        self._outputs = outputs
        self._gradients = gradients
        self._advances = advances
        self._named = [(name, param) for _, param, name in named_parameters(optimizer.param_groups)]
        self._params = [param for _, param in self._named]
        self._addresses = _addresses(self._params)
        self._options = list(_options(optimizer))
        self._fused = optimizer if isinstance(optimizer, FusedAdamW) else None
        self._runner = None if self._fused is None else engine_of(self._fused).runner  # whose memory the graph reads
        self._glance = None if self._fused is None else engine_of(self._fused).glance()
        self._renewed = self._tables_renewed()

    def replay(self, inputs: list[Tensor]) -> Outputs:
        """Run the step once, on these inputs. Enqueues work; reads nothing back.

        Raises:
            RuntimeError: parameters were added, taken away or moved, an option was changed that is a number in the
                graph, or a gradient is there that the graph cannot see. Nothing is run.
        """
        fused, glance = self._fused, self._glance
        if fused is not None:
            engine_of(fused).check_shows_parameters("a captured step")
        is_as_seen = fused is not None and glance is not None and glance.same(attributes_of(fused))
        is_as_seen = is_as_seen and self._renewed == self._tables_renewed()
        if not is_as_seen:
            self._check_parameters()
            self._check_options()
            self._gradients.fetch()
        for scheduler in self._advances:
            scheduler.before_replay()
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        self._graph.replay()
        if not is_as_seen:
            self._gradients.leave()
            if fused is not None and glance is not None:
                glance.remember(attributes_of(fused))
        for scheduler, steps in self._advances.items():
            scheduler.after_replay(steps)
        return self._outputs

    def _check_parameters(self) -> None:
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        if len(params) != len(self._named):
            raise RuntimeError(
                f"the optimizer has {len(params)} parameters, and had {len(self._named)} when its step was captured: "
                "call reset() on the captured step, and it is captured anew"
            )
        if _addresses(params) == self._addresses and all(map(is_, params, self._params)):
            return
        for (name, known), param, address in zip(self._named, params, self._addresses, strict=True):
            if param is not known or local(param).data_ptr() != address:
                raise RuntimeError(
                    f"{name} is not where it was when the step was captured: write to it in place, or call "
                    "reset() on the captured step, and it is captured anew"
                )

    def _check_options(self) -> None:
        """Let the graph know what has changed."""
        options = list(_options(self._optimizer))
        is_same = len(options) == len(self._options) and all(
            now[2] is then[2] for now, then in zip(options, self._options, strict=True)
        )
        renewed = self._tables_renewed()
        is_same = is_same and self._renewed == renewed
        if self._fused is not None:
            for group in self._fused.param_groups:
                group.check_outputs()
            if not is_same:
                _refuse_changes(self._options, options, STATE_OPTIONS)
                self._fused.sync_hyperparameters()
        elif not is_same:
            _refuse_changes(self._options, options)
        self._options = options
        self._renewed = renewed

    def _tables_renewed(self) -> int:
        """How often the tables of schedules have come to have more layers."""
        return 0 if self._fused is None else engine_of(self._fused).renewed


def _addresses(params: list[Tensor]) -> list[int]:
    return [local(param).data_ptr() for param in params]


def _options(optimizer: Optimizer) -> Iterator[tuple[int, str, Any]]:
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", "param_names", "initial_lr"):
                yield index, key, value


def _refuse_changes(
    then: list[tuple[int, str, Any]], now: list[tuple[int, str, Any]], only: tuple[str, ...] | None = None
) -> None:
    before = {(index, key): value for index, key, value in then}
    for index, key, value in now:
        old = before.get((index, key))
        if only is not None and key not in only:
            continue
        value, old = (in_state(value), in_state(old)) if only is not None else (value, old)
        if value is not old and (isinstance(value, Tensor) or isinstance(old, Tensor) or value != old):
            raise RuntimeError(
                f"group {index}'s {key!r} was changed from {shown(old)} to {shown(value)}, and the graph holds what "
                "it was: call reset() on the captured step, and it is captured anew"
            )
