"""The routing of Mixtral 8x7B at the size of a small study."""

from __future__ import annotations

from ...moe.config import BalanceConfig, RouterConfig
from ...moe.train.config import DataConfig, LogConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig


def mixtral() -> TrainConfig:
    """Eight wide experts, two for each token, softmax over the two chosen logits; balanced by micro-batch; for 8 ranks.

    The pieces, after Mixtral (Jiang et al. 2024, arXiv 2401.04088):

    * the two largest logits choose, and the weights are the softmax over just these two, which equals the full softmax
      divided by the sum of the chosen (``router.softmax_after_topk``);
    * eight experts as wide as a dense feed-forward, none shared, no capacity limit; every feed-forward is an MoE layer;
    * balance: the loss of Switch Transformer (Fedus et al. 2021, arXiv 2101.03961) over one rank's micro-batch, the
      common practice that ``qwen3_global_batch`` changes. Mixtral's own training is not published; 0.01 is the
      weight of Switch Transformer.

    Only the method is theirs: the width and the batch are chosen to fit a small study.
    """
    return TrainConfig(
        steps=5000,
        dtype="bfloat16",
        model=ModelConfig(
            hidden_size=512,
            num_layers=8,
            num_heads=8,
            intermediate_size=1536,
            num_experts=8,
            top_k=2,
            moe_intermediate_size=1536,
            moe_every=1,
        ),
        router=RouterConfig(score="softmax", softmax_after_topk=True),
        balance=BalanceConfig(scope="micro", coefficient=0.01),
        data=DataConfig(seq_len=1024, global_batch=128, micro_batch=8),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=250),
        parallel=ParallelConfig(ep=-1),
        log=LogConfig(every=10, eval_every=500, eval_sequences=64),
    )
