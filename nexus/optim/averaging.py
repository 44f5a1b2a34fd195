"""Averages of an optimizer's parameters (`EMA`, `Mean`), shown in their place, and exchanged with torch's."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.swa_utils import AveragedModel

from nexus.arguments import shown
from nexus.backends.sharding import is_spread, local, respread
from nexus.integrations import fully_sharded
from nexus.optim.averages import Mean
from nexus.optim.engine import Engine, attributes_of, devices_of
from nexus.optim.parameters import named_parameters
from nexus.optim.state import is_complete

if TYPE_CHECKING:
    from nexus.optim.groups import ParamGroup


class Averaged:
    """The part of an optimizer that has averages of its parameters."""

    _engine: Engine
    param_groups: list[ParamGroup]
    state: defaultdict[Tensor, Any]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the parameters be their averages, in place, and give them back to the bit at the end.

        For an evaluation, or to save the model's weights. A parameter without an average stays what it is: one of a
        group without, or one that has never had a gradient. Buffers stay, too: where a model has batch
        normalization, give its averaged weights statistics of their own (`torch.optim.swa_utils.update_bn`).

        Raises:
            RuntimeError: no group keeps averages, or these are shown already. Inside, `step()`, `state_dict()` and
                whatever else needs the parameters.

        >>> import torch
        >>> from nexus.optim import EMA, FusedAdamW
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = FusedAdamW([weight], lr=1.0, weight_decay=0.0, average=EMA(decay=0.5))
        >>> for _ in range(3):
        ...     weight.grad = torch.ones(2)
        ...     optimizer.step()
        >>> with optimizer.averaged():
        ...     weight.tolist()
        [-2.25, -2.25]
        >>> weight.tolist()
        [-3.0, -3.0]
        """
        engine = self._engine
        engine.check_shows_parameters("averaged()")
        pairs = [(param, self.state[param]["average"]) for _, param, _ in self._with_averages()]
        engine.shows_averages = True
        shown: list[_Shown] = []
        try:
            fully_sharded.reshard()
            for param, average in pairs:
                shown.append(_Shown(param, average))
            yield
        finally:
            for each in reversed(shown):
                each.put_back()
            fully_sharded.reshard()
            engine.shows_averages = False

    @_disable_dynamo
    def load_average(self, model: nn.Module, averaged: AveragedModel) -> None:
        """Go on with the averages of one of torch's `AveragedModel`, which `model` and its steps have made so far.

        With a `Mean`, the next update counts as much as the model's `n_averaged` says: its `start` is set so.

        Args:
            model: whose parameters are this optimizer's. They have made updates, or have loaded state that has.
            averaged: over `model`, or over a copy of it. Its buffers are not looked at.

        Raises:
            RuntimeError: no group keeps averages, or a parameter has made no update.
            TypeError, ValueError: no `AveragedModel`, or one of another model. Nothing is changed.

        >>> import torch
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> from nexus.optim import EMA, FusedAdamW
        >>> model = torch.nn.Linear(2, 1)
        >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        >>> optimizer = FusedAdamW(model.parameters(), average=EMA(decay=0.9))
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> optimizer.step()
        >>> averaged.update_parameters(model)
        >>> optimizer.load_average(model, averaged)
        """
        pairs = self._exchanged(model, averaged)
        count, completed = int(averaged.n_averaged), self._completed()
        means = [group for group in self.param_groups if isinstance(group["average"], Mean)]
        if means and count > completed:
            raise ValueError(
                f"averaged has n_averaged={count}, and this optimizer has made {completed} updates: load the state "
                "of the optimizer that it was made beside, before"
            )
        for param, theirs in pairs:
            mine = local(self.state[param]["average"])
            mine.copy_(respread(theirs.detach(), param))
        for group in means:
            group["average"] = Mean(completed - count, group["average"].dtype)

    @_disable_dynamo
    def store_average(self, model: nn.Module, averaged: AveragedModel) -> None:
        """Write the averages to one of torch's `AveragedModel`, which can go on with them; and its `n_averaged`.

        Args:
            model: whose parameters are this optimizer's.
            averaged: over `model`, or over a copy of it. Its buffers stay as they are.

        Raises:
            RuntimeError, TypeError, ValueError: as of `load_average`.
        """
        pairs = self._exchanged(model, averaged)
        with torch.no_grad():
            for param, theirs in pairs:
                mine = self.state[param]["average"]
                if is_spread(mine) and not is_spread(theirs):
                    mine = mine.full_tensor()
                local(theirs).detach().copy_(local(mine))
        starts = [group["average"].start for group in self.param_groups if isinstance(group["average"], Mean)]
        averaged.n_averaged.fill_(max(self._completed() - min(starts, default=0), 0))

    def _with_averages(self) -> list[tuple[int, Tensor, str]]:
        """The parameters, as `named_parameters`, that have an average."""
        self._engine.settle(attributes_of(self))  # type: ignore[arg-type]  # this is a part of one
        if all(group["average"] is None for group in self.param_groups):
            raise RuntimeError(
                "no parameter group keeps averages: give FusedAdamW average=EMA(decay=0.999), or in mid-run "
                "optimizer.param_groups[0]['average'] = EMA(decay=0.999), and make steps"
            )
        named = named_parameters(self.param_groups)
        kept = [each for each in named if self.param_groups[each[0]]["average"] is not None]
        return [each for each in kept if isinstance(self.state.get(each[1], {}).get("average"), Tensor)]

    def _exchanged(self, model: nn.Module, averaged: AveragedModel) -> list[tuple[Tensor, Tensor]]:
        """The parameters of a model that have averages here, and what torch's `AveragedModel` has of them."""
        self._engine.check_shows_parameters("an exchange with an AveragedModel")
        if not isinstance(averaged, AveragedModel):
            raise TypeError(f"averaged must be a torch.optim.swa_utils.AveragedModel, got {shown(averaged)}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
        means = {group["average"].start for group in self.param_groups if isinstance(group["average"], Mean)}
        if len(means) > 1:
            raise ValueError(
                f"groups have means from several updates on, {sorted(means)}, and an AveragedModel has one "
                "n_averaged: exchange the averages group by group, as optimizer.state[p]['average']"
            )
        theirs = dict(averaged.module.named_parameters())
        mine = dict(model.named_parameters())
        if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in mine):
            odd = sorted(mine.keys() ^ theirs.keys()) or [n for n in mine if mine[n].shape != theirs[n].shape]
            raise ValueError(f"averaged is of another model than model: they differ in {shown(odd[0])}")
        have = {id(param) for _, param, _ in self._with_averages()}
        for index, param, name in named_parameters(self.param_groups):
            if self.param_groups[index]["average"] is None or not param.requires_grad:
                continue
            state = self.state.get(param)
            if id(param) not in have or not is_complete(state) or float(cast(Any, state)["step"]) == 0:
                raise RuntimeError(
                    f"{name} has no average yet, as it has made no update: make a step, or load the optimizer's "
                    "state, before"
                )
        pairs: list[tuple[Tensor, Tensor]] = []
        pairs += [(param, theirs[name]) for name, param in mine.items() if id(param) in have]
        if not pairs:
            raise ValueError("no parameter of model has an average here: is it another optimizer's model?")
        return pairs

    def _completed(self) -> int:
        return int(self._engine.state_on(devices_of(attributes_of(self))[0]).completed)  # type: ignore[arg-type]


class _Shown:
    """A parameter that is its average for a while.

    Where both are stored alike, each is kept in the place of the other; else the parameter is in memory of its own.
    """

    @torch.no_grad()
    def __init__(self, param: Tensor, average: Tensor) -> None:
        self._param, self._part, self._average = param, local(param).detach(), local(average).detach()
        self._kept: Tensor | None = self._part.clone()
        self._part.copy_(self._average)
        if self._part.dtype == self._average.dtype:
            self._average.copy_(self._kept)
            self._kept = None

    @torch.no_grad()
    def put_back(self) -> None:
        if self._kept is None:
            average = self._part.clone()
            self._part.copy_(self._average)
            self._average.copy_(average)
        else:
            self._part.copy_(self._kept)
        now = local(self._param).detach()
        if now.data_ptr() != self._part.data_ptr() or now.dtype != self._part.dtype:
            now.copy_(self._part)  # the model was converted meanwhile, and has other memory
