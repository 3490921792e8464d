"""The routing of Qwen3's MoE models, balanced over the global batch, at the size of a small study."""

from __future__ import annotations

from ...moe.config import BalanceConfig, MoEConfig, RouterConfig
from ...moe.train.config import DataConfig, LogConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig


def qwen3_global_batch() -> TrainConfig:
    """Qwen3's routing in a small model: 64 narrow experts, global-batch balance loss, for 8 ranks.

    It follows Qwen3 (Yang et al. 2025, arXiv 2505.09388) and the paper of its balance loss (Qiu et al. 2025, arXiv
    2501.11873):

    * routing: softmax scores over all experts (``moe.router.score``); gate weights are the chosen scores divided by
      their sum (``moe.router.normalize_weights``);
    * layers: an MoE layer in every block, many narrow experts, no shared experts;
    * balance: the load is counted over the whole optimizer step on all ranks (``moe.balance.scope``), so experts can
      specialise in domains as long as the whole step is balanced. The coefficient 0.008 and the z-loss 0.001 are from
      the second paper, which takes the latter from ST-MoE (Zoph et al. 2022, arXiv 2202.08906).

    64 experts of width 192 and 128 sequences per step are our choice, to fit a small study. Tokens are bytes unless
    ``data.tokenizer`` names a tokenizer; ``data.path`` names your own text.
    """
    return TrainConfig(
        steps=5000,
        dtype="bfloat16",
        model=ModelConfig(num_layers=8, num_heads=8, intermediate_size=1536, moe_every=1),
        moe=MoEConfig(
            hidden_size=512,
            intermediate_size=192,
            num_experts=64,
            top_k=8,
            router=RouterConfig(score="softmax", normalize_weights=True, softmax_after_topk=False, z_loss=0.001),
            balance=BalanceConfig(scope="global", coefficient=0.008, estimator="rolling"),
        ),
        data=DataConfig(seq_len=1024, global_batch=128, micro_batch=8),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=250),
        parallel=ParallelConfig(ep=-1),
        log=LogConfig(every=10, eval_every=500, eval_sequences=64),
    )
