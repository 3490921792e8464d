"""Routers that read a number per token besides its hidden state.

T tokens, D hidden, E experts, K top-k, V token ids, N tasks, R width of a task's embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..collectives import fill_normal
from ..config import RouterConfig
from ..types import Decision, Routing
from .compose import sum_by_sequence
from .router import Router


class HashRouter(Router):
    """Looks up a token's experts by its id (hash layers, arXiv 2106.04426). It has no parameters.

    ``weight`` is the table, int64 [V, K]: random, the same in every layer and run, and each expert has equally many
    ids. Gate weights are 1, or 1/K if they are normalised. The load is only as even as the frequencies of the ids.
    """

    reads = "tokens"

    def make_parameters(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:
        if config.vocabulary is None:
            raise ValueError("router.vocabulary=None: router.gate='hash' needs the number of token ids; set it")
        self.num_experts = num_experts
        self.register_buffer("weight", torch.empty(config.vocabulary, self.top_k, dtype=torch.int64), persistent=False)
        self.gate_weight = config.weight_scale / (self.top_k if config.normalize_weights else 1)

    def reset_parameters(self) -> None:
        """Fill the table."""
        ids, k = self.weight.shape
        self.weight.copy_(balanced_table(ids, self.num_experts, k, self.weight.device))

    def forward(
        self,
        x_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: int = 1,
        decision: Decision | None = None,
        codes_T: Tensor | None = None,
    ) -> Routing:
        if decision is None:
            chosen_TK = self._look_up(codes_T)
            decision = Decision(chosen_TK, chosen_TK if mask_T is None else chosen_TK.masked_fill(~mask_T[:, None], -1))
        chosen_TK = decision.chosen_TK
        valid_T = torch.ones_like(chosen_TK[:, 0], dtype=torch.bool) if mask_T is None else mask_T
        taken_TE = chosen_TK.new_zeros(len(chosen_TK), self.num_experts)
        taken_TE.scatter_add_(1, chosen_TK, valid_T[:, None].long().expand_as(chosen_TK))
        counts_BE = sum_by_sequence(taken_TE, sequences)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return Routing(
            decision,
            torch.full(chosen_TK.shape, self.gate_weight, dtype=dtype, device=x_TD.device),
            counts_BE,
            sum_by_sequence(valid_T.long()[:, None], sequences)[:, 0],
            counts_BE.to(dtype) / self.top_k,
            torch.zeros((), dtype=dtype, device=x_TD.device),
        )

    def probabilities(self, x_TD: Tensor, codes_T: Tensor | None = None) -> Tensor:
        chosen_TK = self._look_up(codes_T)
        probs_TE = torch.zeros(len(chosen_TK), self.num_experts, device=x_TD.device)
        return probs_TE.scatter_(1, chosen_TK, 1 / self.top_k)

    def _look_up(self, codes_T: Tensor | None) -> Tensor:
        if codes_T is None:
            raise ValueError("codes=None: router.gate='hash' routes by token ids; call layer(x, mask, codes=ids)")
        check_codes(codes_T, 0, "router.vocabulary", len(self.weight), "give token ids")
        return F.embedding(codes_T, self.weight)


def check_codes(codes_T: Tensor, least: int, field: str, number: int, remedy: str) -> None:
    """Raise ValueError if a code on a CPU is below ``least``, or not below ``number``, the value of ``field``.

    On a GPU the host would have to wait for the codes, and a compiled graph cannot read them. There the look-up in
    :func:`torch.nn.functional.embedding` stops the device with an assertion, or raises.
    """
    if codes_T.device.type != "cpu" or torch.compiler.is_compiling():
        return
    inside_T = (codes_T >= least) & (codes_T < number)
    if bool(inside_T.all()):
        return
    wrong = int(codes_T[~inside_T][0])
    raise ValueError(
        f"codes={wrong}: out of range for {field}={number}; {remedy} from {least} to {number - 1}, also where the mask "
        "is False"
    )


def balanced_table(ids: int, experts: int, k: int, device: torch.device) -> Tensor:
    """Return k different experts for each id, int64 [ids, k]; each column has every expert equally often.

    Ids are shuffled and cut into blocks of E. Within a block, experts are shuffled, and an id's experts are the k from
    its place on, in a circle.
    """
    order_V = _mixed(torch.arange(ids, device=device)).argsort(stable=True)
    rank_V = torch.empty_like(order_V).scatter_(0, order_V, torch.arange(ids, device=device))
    blocks = -(-ids // experts)
    shuffled_BE = _mixed(torch.arange(ids, ids + blocks * experts, device=device)).view(blocks, experts).argsort(1)
    place_VK = (rank_V % experts)[:, None] + torch.arange(k, device=device)
    return shuffled_BE[rank_V // experts].gather(1, place_VK % experts)


def _mixed(numbers: Tensor) -> Tensor:
    """Map different int64 to numbers without an apparent order; products wrap around."""
    for factor in (-0x61C8864680B583EB, -0x4B47D0C5A6D5B4A7, 0x2545F4914F6CDD1D):
        numbers = numbers * factor
        numbers = numbers ^ (numbers >> 29)
    return numbers


class TaskRouter(Router):
    """Computes the logits from the hidden state and an embedding of the token's task (arXiv 2204.07689).

    They are [h; e] W, with W split into ``weight`` [E, D] and ``task_weight`` [E, R]; e is a row of ``task_embedding``
    [N, R]. Task -1 is unknown and has the mean of all embeddings, as have all tokens in evaluation if no tasks are
    given.
    """

    reads = "tasks"

    def make_parameters(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:
        super().make_parameters(hidden_size, num_experts, config)
        assert config.tasks is not None
        self.task_weight = nn.Parameter(torch.empty(num_experts, config.task_width))
        self.task_embedding = nn.Parameter(torch.empty(config.tasks, config.task_width))

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values, and the bias with zero."""
        super().reset_parameters()
        fill_normal(self.task_weight, self.init_std)
        fill_normal(self.task_embedding, 1.0)

    def forward(
        self,
        x_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: int = 1,
        decision: Decision | None = None,
        codes_T: Tensor | None = None,
    ) -> Routing:
        logits_TE = self.training_logits(x_TD) if self.training else self.logits(x_TD)
        return self.routing(logits_TE + self._of_tasks(codes_T), mask_T, sequences, decision)

    def probabilities(self, x_TD: Tensor, codes_T: Tensor | None = None) -> Tensor:
        return self.score(self.logits(x_TD) + self._of_tasks(codes_T)).softmax(-1)

    def _of_tasks(self, codes_T: Tensor | None) -> Tensor:
        """Return the tasks' part of the logits, [T, E] or [1, E]."""
        if codes_T is None:
            if self.training:
                raise ValueError(
                    "codes=None: router.gate='task' needs each token's task; call layer(x, mask, codes=tasks), and use "
                    "-1 for an unknown one"
                )
            codes_T = torch.full((1,), -1, device=self.weight.device)
        known_NR, tasks = self.task_embedding, len(self.task_embedding)
        check_codes(codes_T, -1, "router.tasks", tasks, "give tasks")
        all_NR = torch.cat((known_NR, known_NR.mean(0, keepdim=True)))
        # -1 is the last row; codes out of range get rows that do not exist
        row_T = torch.where(codes_T < 0, tasks - 1 - codes_T, codes_T + (codes_T >= tasks))
        return F.embedding(row_T, self.product(all_NR, self.task_weight))
