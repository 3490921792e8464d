"""The routing of Mixtral 8x7B at the size of a small study."""

from __future__ import annotations

from ...moe.config import BalanceConfig, MoEConfig, RouterConfig
from ...moe.train.config import DataConfig, LogConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig


def mixtral() -> TrainConfig:
    """Mixtral's routing in a small model: eight wide experts, two per token, micro-batch balance, for 8 ranks.

    It follows Mixtral (Jiang et al. 2024, arXiv 2401.04088):

    * routing: top-2 logits; gate weights are the softmax over these two, which equals the chosen scores of the full
      softmax divided by their sum (``moe.router.softmax_after_topk``);
    * layers: an MoE layer in every block, eight experts as wide as a dense feed-forward, no shared experts, no
      capacity;
    * balance: the loss of Switch Transformer (Fedus et al. 2021, arXiv 2101.03961) over one rank's micro-batch, with
      Switch Transformer's coefficient 0.01, because Mixtral's training is not published. Compare with
      ``qwen3_global_batch``, which balances over the global batch.

    Width and batch size are our choice, to fit a small study.
    """
    return TrainConfig(
        steps=5000,
        dtype="bfloat16",
        model=ModelConfig(num_layers=8, num_heads=8, intermediate_size=1536, moe_every=1),
        moe=MoEConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_experts=8,
            top_k=2,
            router=RouterConfig(score="softmax", softmax_after_topk=True),
            balance=BalanceConfig(scope="micro", coefficient=0.01),
        ),
        data=DataConfig(seq_len=1024, global_batch=128, micro_batch=8),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=250),
        parallel=ParallelConfig(ep=-1),
        log=LogConfig(every=10, eval_every=500, eval_sequences=64),
    )
