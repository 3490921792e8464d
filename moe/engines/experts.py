"""Places experts while training: replicas for every step, and new owners from time to time.

L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from ..checkpoint import Boxes, State, owned, tensors_of
from ..collectives import LOCAL, Axis, exchange_rows, sum_over
from ..config import PlacementConfig
from ..dispatch import node_size
from ..layer import MoE
from ..placement import Forecast, Owners, Replicas, calibrate, materialize, read_owners, reshard
from ..replication import Calibration

#: chooses the replicas of a step for every layer, from the expected loads fp64 [L, E] (None: unknown) and the owners
Planner = Callable[["Tensor | None", Sequence[Owners]], list[Replicas]]


class ExpertPlacement:
    """Decides before every step which ranks hold which experts of ``layers``, alike on all ranks of ``axis``.

    ``stage`` has the ranks that hold different tokens of the same layers, ``dtype`` is the one in which experts compute
    if it is not their weights'. ``whole`` are the numbers of experts of all layers, if other pipeline stages have some.
    Without layers, nothing is done.
    """

    def __init__(
        self,
        layers: Mapping[str, MoE],
        config: PlacementConfig,
        axis: Axis = LOCAL,
        stage: Axis = LOCAL,
        dtype: torch.dtype | None = None,
        whole: Mapping[str, int] | None = None,
    ) -> None:
        self.layers, self.config, self.axis, self.stage = list(layers.values()), config, axis, stage
        self._name_of = {layer: name for name, layer in layers.items()}
        self.forecast = Forecast(config.window)
        self.steps = 0
        #: whether experts move before the next step
        self._moves = False
        self.plan: Planner = self._most_loaded
        #: ranks per node, and replicas of a layer that a rank has room for
        self.node_size = 1 if axis.size == 1 else config.node_size or node_size(axis)
        self.room = min((config.replicas_per_rank(_bytes_of_expert(layer, dtype)) for layer in self.layers), default=0)
        if axis.size % self.node_size:
            raise ValueError(
                f"placement.node_size={self.node_size}: must divide the {axis.size} ranks that experts are distributed "
                "over; use a divisor"
            )
        if len({layer.experts for layer in self.layers}) < len(self.layers):
            raise ValueError("parallel.experts='fssdp': two layers share their experts; use parallel.experts='ep'")
        if config.owners is not None and self.layers:
            numbers = whole or {name: layer.config.num_experts for name, layer in layers.items()}
            found = dict(zip(numbers, read_owners(Path(config.owners), [*numbers.values()], axis.size), strict=True))
            self.move([found[name] for name in layers], None)

    @property
    def owners(self) -> list[Owners]:
        return [layer.balancer.owners for layer in self.layers]

    def begin(self, optimizer: Optimizer | None) -> None:
        """Move experts to new owners if it is time, and choose the replicas of the step that begins.

        Owners do not change after a step, but before the next one, so that a record of the step sees what it used.
        """
        loads_LE = self.forecast.loads_LE
        if self._moves and loads_LE is not None:
            self._moves = False  # the step may be refused, and begin again
            loads_of = _by_layer(loads_LE, self.owners)
            self.move(reshard(loads_of, self.owners, self.config.overlap, self.room, self.node_size), optimizer)
        for layer, replicas in zip(self.layers, self.plan(self.forecast.loads_LE, self.owners), strict=True):
            layer.hold(replicas, self.config.rematerialize, self._calibration)

    @property
    def _calibration(self) -> Calibration | None:
        rows = self.config.calibrate
        if rows is None:
            return None
        return partial(calibrate, overlap=self.config.overlap, memory=self.room, rows_per_expert=rows)

    def _most_loaded(self, loads_LE: Tensor | None, owners: Sequence[Owners]) -> list[Replicas]:
        if loads_LE is None:
            return [Replicas(of_layer, node_size=self.node_size) for of_layer in owners]
        c = self.config
        return [
            materialize(loads_E, of_layer, c.overlap, self.room, self.node_size)
            for loads_E, of_layer in zip(_by_layer(loads_LE, owners), owners, strict=True)
        ]

    def end(self) -> None:
        """Observe the load of the step that has ended."""
        if self.layers:
            self.forecast.observe(self._counts_LE())
            self._reach(self.steps + 1)

    def _reach(self, steps: int) -> None:
        every = self.config.reshard_every
        self.steps, self._moves = steps, bool(every) and steps % every == 0

    def marked(self, state: dict[str, Tensor]) -> dict[str, Tensor | Boxes]:
        """Return a ``state``, by logical names, in which experts' tensors say which experts this rank owns."""
        found: dict[str, Tensor | Boxes] = dict(state)
        for layer, name in self._name_of.items():
            experts = layer.balancer.owners.experts_of(self.axis.rank)
            prefix = f"{name}.experts." if name else "experts."
            for key, value in state.items():
                if key.partition(".")[2].startswith(prefix) and isinstance(value, DTensor):
                    found[key] = owned(key, value, experts)
        return found

    def memory(self) -> dict[str, Tensor]:
        """Return what a resume needs to place experts as this run would: loads of the last steps, and owners.

        Fill the tensors in place and pass them to :meth:`remember`. Their names say for which number of ranks and which
        window they are.
        """
        if not self.layers:
            return {}
        found = {f"{self._run}.steps": torch.tensor(self.steps)}
        for i, (layer, name) in enumerate(self._name_of.items()):
            loads = [step[i, : layer.config.num_experts] for step in self.forecast.steps]
            lacking = [torch.full((layer.config.num_experts,), -1)] * (self.config.window - len(loads))
            owners = torch.tensor(layer.balancer.owners.rank_of_E)
            found[f"{self._run}.{name}"] = torch.stack([*lacking, *loads, owners])
        return found

    def remember(self, state: State, optimizer: Optimizer | None) -> None:
        """Go on from a filled :meth:`memory`. The weights in ``state`` are in place under the present owners."""
        if not self.layers:
            return
        tensors = tensors_of({name: value for name, value in state.items() if name.startswith(self._run)})
        self._reach(int(tensors[f"{self._run}.steps"]))
        of_layers = [tensors[f"{self._run}.{name}"] for name in self._name_of.values()]
        self.forecast = Forecast(self.config.window)
        for n in range(self.config.window):
            loads_LE = pad_sequence([table[n] for table in of_layers], batch_first=True)
            if bool((loads_LE >= 0).all()):
                self.forecast.observe(loads_LE)
        self.move([Owners.of_ranks(self.axis.size, table[-1].tolist()) for table in of_layers], optimizer)

    @property
    def _run(self) -> str:
        return f"placement.{self.axis.size} ranks.window {self.config.window}"

    def _counts_LE(self) -> Tensor:
        """Return the choices of the step that has ended, on all ranks, int64 [L, E].

        Layers with fewer experts have zeros after them. So do layers that were not counted, because neither they nor
        anything before them is trained: nothing is known of their load, and they get no replicas.
        """
        summed = all(layer.balancer.counting_axis == self.stage for layer in self.layers)
        counts: list[Tensor] = []
        for layer in self.layers:
            step, experts, device = layer.balancer.previous_step, layer.config.num_experts, layer.router.weight.device
            if step is None:
                counts.append(torch.zeros(experts, dtype=torch.int64, device=device))
            else:
                counts.append((step.counts_E if summed else step.local_counts_ME.sum(0))[:experts])
        counts_LE = pad_sequence(counts, batch_first=True)
        return counts_LE if summed else sum_over(counts_LE, self.stage).get()  # the balance has summed them, or not

    @torch.no_grad()
    def move(self, owners: Sequence[Owners], optimizer: Optimizer | None) -> None:
        """Give every layer's experts to new owners, with their moments. Bits stay."""
        for layer, of_layer in zip(self.layers, owners, strict=True):
            before = layer.balancer.owners
            if of_layer == before:
                continue
            for weight in layer.experts.parameters():
                moments = {} if optimizer is None else optimizer.state.get(weight, {})
                for tensor in (weight, *moments.values()):
                    if isinstance(tensor, DTensor):
                        tensor._local_tensor = _moved(tensor.to_local(), before, of_layer, self.axis)
            layer.place(replace(layer.balancer.placement, owners=of_layer))


def _by_layer(loads_LE: Tensor, owners: Sequence[Owners]) -> list[list[float]]:
    """Return the loads of each layer's experts."""
    return [loads_E[: of.num_experts] for loads_E, of in zip(loads_LE.tolist(), owners, strict=True)]


def _bytes_of_expert(layer: MoE, dtype: torch.dtype | None) -> int:
    """Return the bytes of an expert's weights on a rank, in the dtype in which it computes."""
    size = None if dtype is None else dtype.itemsize
    whole = sum(weight.numel() * (size or weight.element_size()) for weight in layer.experts.parameters())
    return whole // layer.config.num_experts // layer.balancer.placement.etp.size


def _moved(rows: Tensor, before: Owners, after: Owners, axis: Axis) -> Tensor:
    """Return this rank's rows under the owners ``after``; ``rows`` are those under ``before``."""
    own, slot = before.experts_of(axis.rank), before.slot_of_E
    sent = [[e for e in own if after.rank_of_E[e] == rank] for rank in range(axis.size)]
    wanted = after.experts_of(axis.rank)
    arriving = [[e for e in before.experts_of(rank) if e in set(wanted)] for rank in range(axis.size)]
    leaving = [slot[e] for experts in sent for e in experts]
    found = exchange_rows(rows[leaving], [len(s) for s in sent], [len(a) for a in arriving], axis)
    order = {e: i for i, e in enumerate(e for experts in arriving for e in experts)}
    return found[[order[e] for e in wanted]].clone()
