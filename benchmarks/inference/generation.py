"""Measures text generation beside transformers' own ``generate``, on the same weights.

    python benchmarks/inference/generation.py [--rounds 7] [--tokens 64]

Tiny random models of several families continue four prompts of 32 tokens, greedily, in fp32. Both libraries take turns
in every round; a figure is the median over the rounds, in new tokens per second of all prompts together. The last line
says whether the tokens were the same. Needs transformers (`make engines` installs it).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.shared.options import Parser, positive
from benchmarks.shared.records import facts_line
from equimoe.launch import loaded
from equimoe.launch.env import command
from equimoe.moe.serve import Sampling, generate

PROMPTS, LENGTH = 4, 32
COMMON = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 4096}
#: family -> its configuration
MODELS = {
    "Mixtral": {**COMMON, "intermediate_size": 512, "num_key_value_heads": 2, "num_local_experts": 8},
    "Qwen3Moe": {
        **COMMON,
        "moe_intermediate_size": 256,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "DeepseekV3": {
        **COMMON,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_key_value_heads": 8,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
}


def measure(family: str, rounds: int, tokens: int, folder: Path) -> tuple[float, float, bool]:
    """Return new tokens per second of transformers and of this package, and whether the tokens were the same."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**MODELS[family], initializer_range=0.1)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(folder)
    ours = loaded.build(loaded.find(folder), None, torch.device("cpu"), LENGTH + tokens, torch.float32)
    ids = torch.randint(config.vocab_size, (PROMPTS, LENGTH))
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    same = True
    for number in range(rounds + 1):
        start = time.perf_counter()
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, LENGTH:].tolist()
        middle = time.perf_counter()
        found = generate(ours, ids.tolist(), Sampling(tokens, temperature=0), batch=PROMPTS)
        end = time.perf_counter()
        same &= [found[n] for n in range(PROMPTS)] == want
        if number:  # the first round warms up
            seconds["theirs"].append(middle - start)
            seconds["ours"].append(end - middle)
    rates = [PROMPTS * tokens / statistics.median(values) for values in seconds.values()]
    return rates[0], rates[1], same


@command
def main() -> None:
    """Measure every family, and print a table."""
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--tokens", type=positive, default=64)
    arguments = parser.parse_args()
    import transformers

    torch.set_num_threads(1)
    print(f"{facts_line()}, transformers {transformers.__version__}, 1 thread\n")
    print(f"{'model':<12}{'transformers':>14}{'equimoe':>10}{'ratio':>8}   new tokens/s")
    equal = 0
    for family in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours, same = measure(family, arguments.rounds, arguments.tokens, Path(folder) / "model")
        equal += same
        print(f"{family:<12}{theirs:>14.1f}{ours:>10.1f}{ours / theirs:>8.2f}", flush=True)
    print(f"\n{equal} of {len(MODELS)} models: the same tokens")
    sys.exit(equal != len(MODELS))


if __name__ == "__main__":
    main()
