"""The engine for replicated weights or torch's FSDP2, on any mesh, with whole models or pipelines."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoint import State, expect_moments, restore_optimizer, tensors_of, training_state
from ..collectives import LOCAL
from ..experts import cast_once
from ..parallel import Mesh, clip_grad_norm_, forget_step, free_gathered
from ..parallel.grad_norm import local_part
from .balance import StepBalance
from .base import Accept, Batch, Computed, OptimizerFactory, StepResult
from .experts import ExpertPlacement
from .inputs import accepted, count_tokens, evaluation_mode, local_batches
from .reduce import Reducer
from .runners import Runner


class TorchEngine:
    """Implements :class:`equimoe.moe.engines.base.Engine`. Built by :func:`equimoe.moe.engines.build_engine`.

    ``parts`` are the whole model, or this rank's pipeline stages. Gradients are clipped to ``max_norm`` (0: not
    clipped).
    """

    def __init__(
        self,
        parts: list[nn.Module],
        parameters: dict[str, nn.Parameter],
        mesh: Mesh | None,
        runner: Runner,
        reducer: Reducer,
        balance: StepBalance,
        experts: ExpertPlacement,
        optimizer: OptimizerFactory,
        device: torch.device,
        max_norm: float,
    ) -> None:
        self.parts, self.balance, self.experts = parts, balance, experts
        #: this rank's parameters by their names in the whole model. Modules cannot be asked for them, because FSDP
        #: temporarily replaces its parameters with gathered ones.
        self.parameters = parameters
        self.optimizer: Optimizer | None = None
        self._mesh, self._runner, self._reducer = mesh, runner, reducer
        self._make_optimizer, self._device, self._max_norm = optimizer, device, max_norm
        self._adopt_trainable()

    def step(self, batches: list[Batch], lr: float, accept: Accept | None = None) -> StepResult:
        """See :meth:`equimoe.moe.engines.base.Engine.step`."""
        self._reducer.settle()
        self._adopt_trainable()
        try:
            local = local_batches(batches, self._mesh, self._device, self.parts)
            counted = count_tokens(batches, local, self._mesh, self.parameters)
            self.experts.begin(self.optimizer)
            self.balance.begin(len(local), counted.routed)
            self._reducer.begin(counted.check_alike)
            with cast_once(*self.parts):
                losses = self._runner.train(local, counted.tokens.clamp_min(1), self.balance)
            self._reducer.finish()
            stages = LOCAL if self._mesh is None else self._mesh["pp"]
            norm = clip_grad_norm_(self.parameters.values(), self._max_norm, stages)
            applied = accepted(accept, Computed(losses, norm, counted.tokens, self._gradient), self._mesh)
            if applied:
                self._update(lr)
        except BaseException:
            self.balance.discard()
            forget_step(self.parts)
            raise
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None
        self.balance.end(applied)
        if applied:
            self.experts.end()
        return StepResult(losses, norm, applied)

    def _gradient(self) -> list[Tensor]:
        return [local_part(p.grad) for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> list[Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.evaluate`."""
        self._reducer.settle()
        try:
            with evaluation_mode(self.parts), cast_once(*self.parts):
                return self._runner.evaluate(local_batches(batches, self._mesh, self._device, self.parts))
        except BaseException:
            forget_step(self.parts)
            raise
        finally:
            free_gathered(self.parts)

    def weights(self) -> dict[str, Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.weights`."""
        # the balancer moves router biases without a gradient; all other buffers are constants
        biases = {n: b for part in self.parts for n, b in part.named_buffers() if n.endswith("router.bias_E")}
        return {name: p.detach() for name, p in self.parameters.items()} | biases

    def moments(self) -> dict[str, Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.moments`."""
        if self.optimizer is None:
            return {}
        found = training_state(self._trained(), self.optimizer, {})
        return {name: value for name, value in found.items() if name.startswith("optimizer.")}

    def state(self) -> State:
        """See :meth:`equimoe.moe.engines.base.Engine.state`."""
        state = {f"model.{name}": weight for name, weight in self.weights().items()} | self.moments()
        return self.experts.marked(state) | self.experts.memory()

    def expect(self, names: Collection[str]) -> None:
        """See :meth:`equimoe.moe.engines.base.Engine.expect`."""
        frozen = {
            name: p for name, p in self.parameters.items() if not p.requires_grad and f"optimizer.{name}.step" in names
        }
        self._adopt(frozen)
        if self.optimizer is not None:
            expect_moments(frozen, self.optimizer)

    def restore(self, state: State) -> None:
        """See :meth:`equimoe.moe.engines.base.Engine.restore`."""
        if self.optimizer is not None:
            restore_optimizer(self._trained(), self.optimizer, tensors_of(state))
        self.experts.remember(state, self.optimizer)

    def _trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the optimizer holds."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        held = {p for group in groups for p in group["params"]}
        return {name: p for name, p in self.parameters.items() if p in held}

    def _adopt_trainable(self) -> None:
        """Give the optimizer the trainable weights that it does not hold yet."""
        self._adopt({name: p for name, p in self.parameters.items() if p.requires_grad})

    def _adopt(self, parameters: dict[str, nn.Parameter]) -> None:
        trained = self._trained()
        new = {name: p for name, p in parameters.items() if name not in trained}
        if not new:
            return
        made = self._make_optimizer(new)
        if self.optimizer is None:
            self.optimizer = made
        else:
            for group in made.param_groups:
                self.optimizer.add_param_group(group)

    def _update(self, lr: float) -> None:
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
