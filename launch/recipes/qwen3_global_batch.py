"""The routing of Qwen3's MoE models, balanced over the global batch, at the size of a small study."""

from __future__ import annotations

from ...moe.config import BalanceConfig, RouterConfig
from ...moe.train.config import DataConfig, LogConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig


def qwen3_global_batch() -> TrainConfig:
    """Fine-grained experts, normalised softmax top-k and the global-batch balance loss, for 8 ranks.

    The pieces, after Qwen3 (Yang et al. 2025, arXiv 2505.09388) and the paper of its balance loss (Qiu et al. 2025,
    arXiv 2501.11873):

    * scores: softmax over all experts, in ``router.score``;
    * weights: the chosen scores divided by their sum, in ``router.normalize_weights``;
    * many narrow experts, none of them shared; every feed-forward is an MoE layer;
    * balance: the load is counted over the whole optimizer step on all ranks (``balance.scope``), so that a domain may
      keep its own experts as long as the step as a whole is balanced. The weight 0.008 and the z-loss 0.001 are those
      of the second paper and of ST-MoE (Zoph et al. 2022, arXiv 2202.08906), which it follows.

    Only the method is theirs: 64 experts of width 192 and a batch of 128 sequences are chosen to fit a small study.
    Bytes are the tokens unless ``data.tokenizer`` names a tokenizer; give your own text, with its domains, in
    ``data.path``.
    """
    return TrainConfig(
        steps=5000,
        dtype="bfloat16",
        model=ModelConfig(
            hidden_size=512,
            num_layers=8,
            num_heads=8,
            intermediate_size=1536,
            num_experts=64,
            top_k=8,
            moe_intermediate_size=192,
            moe_every=1,
        ),
        router=RouterConfig(score="softmax", normalize_weights=True, softmax_after_topk=False, z_loss=0.001),
        balance=BalanceConfig(scope="global", coefficient=0.008, estimator="rolling"),
        data=DataConfig(seq_len=1024, global_batch=128, micro_batch=8),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=250),
        parallel=ParallelConfig(ep=-1),
        log=LogConfig(every=10, eval_every=500, eval_sequences=64),
    )
