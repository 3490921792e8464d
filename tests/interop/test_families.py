"""Reads published configurations of transformers' models, writes them again, and refuses what the decoder lacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from equimoe.launch.recipes import RECIPES
from equimoe.moe.config import RotaryScaling
from equimoe.moe.interop.architecture import architecture
from equimoe.moe.interop.families import FAMILIES, family_of, read_config
from equimoe.moe.interop.names import names, theirs
from equimoe.moe.model import Decoder
from tests.helpers.hf_folders import config as tiny
from tests.helpers.published import PUBLISHED, config_of

SCALED = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
SCALED["original_max_position_embeddings"] = 4096


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    """The tensors of both layouts have the published number of parameters, and the family is found from the model."""
    kind, found = read_config(config_of(name), name)
    for layout in ("v4", "v5"):
        ours = names(FAMILIES[kind], found, layout)
        total = sum(math.prod(tensor.shape) for tensor in ours.values())
        assert total == sum(math.prod(shape) for shape, _ in theirs(ours).values())
        assert total == pytest.approx(PUBLISHED[name].parameters, rel=0.006)
    again, written = family_of(found)
    assert again == kind
    assert read_config(written, name)[0] == kind


def test_the_decoder_has_these_tensors() -> None:
    """Names and shapes are those of the decoder that the sections of the configuration describe."""
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 24}
    small |= {"intermediate_size": 12, "moe_intermediate_size": 8, "num_key_value_heads": 2, "head_dim": 6}
    small |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    small |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6, "kv_lora_rank": 5, "q_lora_rank": 7}
    small |= {"shared_expert_intermediate_size": 10, "n_group": 2, "topk_group": 1, "attention_bias": True}
    small |= {"n_shared_experts": 1, "first_k_dense_replace": 1}
    for kind, family in FAMILIES.items():
        own = {"num_key_value_heads": 4, "rms_norm_eps": 1e-6} if "deepseek" in kind else {}
        own |= {"head_dim": None} if kind == "olmoe" else {}
        _, found = read_config(small | own | {"model_type": kind}, kind)
        model = Decoder(
            vocab_size=found.vocab_size,
            seq_len=8,
            num_layers=found.num_layers,
            num_heads=found.num_heads,
            intermediate_size=found.intermediate_size or 1,
            moe=found.moe,
            moe_every=found.moe_every,
            dense_layers=found.dense_layers,
            attention=found.attention,
            norm_eps=found.norm_eps,
            tie_embeddings=found.tie_embeddings,
        )
        want = {name: tuple(p.shape) for name, p in model.named_parameters()}
        ours = {name: tensor.shape for name, tensor in names(family, found, "v4").items()}
        assert {name: shape for name, shape in ours.items() if not name.endswith("bias_E")} == want


def test_recipes_are_their_models() -> None:
    """The architecture of a recipe is that of the model whose name it has."""
    for recipe, model in (
        *(("deepseek_v2", "DeepSeek-V2"), ("deepseek_v3", "DeepSeek-V3"), ("mixtral_8x7b", "Mixtral-8x7B")),
        *(("qwen3_30b", "Qwen3-30B-A3B"), ("qwen3_235b", "Qwen3-235B-A22B"), ("olmoe", "OLMoE-1B-7B")),
    ):
        config = RECIPES[recipe]()
        _, found = read_config(config_of(model) | {"rope_scaling": None}, model)
        sections = found.sections()
        own = {"model": vars(config.model), "attention": vars(config.attention)}
        own["moe"] = vars(config.moe) | {"router": vars(config.moe.router)}
        written = architecture(own, found.expert_bias)
        assert written.sections()["moe"] == sections["moe"] | {"router": written.sections()["moe"]["router"]}
        assert written.attention == found.attention


def test_rotary_scaling_of_both_versions() -> None:
    """transformers 4 has ``rope_scaling`` beside ``rope_theta``, and version 5 has both in one."""
    old = config_of("DeepSeek-V3") | {"rope_theta": 5000.0, "rope_scaling": SCALED}
    new = config_of("DeepSeek-V3") | {"rope_scaling": None, "rope_parameters": {"rope_theta": 5000.0} | SCALED}
    new["rope_parameters"]["rope_type"] = new["rope_parameters"].pop("type")
    found = [read_config(values, "config.json")[1].attention for values in (old, new)]
    assert found[0] == found[1] and found[0].rotary_base == 5000.0
    scale = 0.1 * math.log(40) + 1
    assert found[0].scaling == RotaryScaling("yarn", 40.0, 4096, 32.0, 1.0, 1.0, scale**2)
    plain = read_config(config_of("Qwen3-30B-A3B") | {"rope_scaling": SCALED}, "config.json")[1].attention.scaling
    assert (
        plain is not None and plain.score_scale == 1.0 and plain.table_scale == 1.0
    )  # only DeepSeek's has a score scale


@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear"])
@pytest.mark.parametrize("name", ["DeepSeek-V3", "Mixtral-8x7B"])
def test_rotary_scaling_is_written(name: str, kind: str) -> None:
    scaling = SCALED | {"rope_type": kind, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "mscale_all_dim": 0.7}
    values = config_of(name) | {"rope_scaling": None, "rope_parameters": scaling | {"rope_theta": 1e5}}
    _, found = read_config(values, "config.json")
    _, again = read_config(family_of(found)[1], "config.json")
    assert found.attention.scaling is not None and again.attention.scaling is not None
    assert again.attention.scaling.score_scale == pytest.approx(found.attention.scaling.score_scale, rel=1e-12)
    assert again.attention.scaling.kind == kind and again.attention.rotary_base == 1e5


def test_dense_blocks_and_windows() -> None:
    base = config_of("Qwen3-30B-A3B") | {"num_hidden_layers": 6}

    def dense(**settings: Any) -> list[bool]:
        _, found = read_config(base | settings, "config.json")
        assert read_config(family_of(found)[1], "config.json")[1] == found
        return [not found.is_moe(block) for block in range(6)]

    assert dense() == [False] * 6
    assert dense(decoder_sparse_step=2) == [True, False] * 3
    assert dense(mlp_only_layers=[0, 1]) == [True] * 2 + [False] * 4
    assert dense(mlp_only_layers=[1], decoder_sparse_step=2) == [True, True, True, False, True, False]
    full, sliding = "full_attention", "sliding_attention"
    qwen2 = config_of("Qwen1.5-MoE-A2.7B") | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7}
    _, found = read_config(qwen2 | {"layer_types": [full, sliding, sliding]}, "config.json")
    assert [found.attention.window_of(block) for block in range(3)] == [None, 7, 7]
    assert read_config(family_of(found)[1], "config.json")[1] == found
    with pytest.raises(
        ValueError, match=r"^config.json: layer_types=.*: this decoder can have full attention only in "
    ):
        read_config(qwen2 | {"layer_types": [sliding, full, sliding]}, "config.json")
    with pytest.raises(ValueError, match="layer_types=None: versions of transformers disagree"):
        read_config(qwen2, "config.json")


def test_models_that_other_families_have() -> None:
    """Qwen2-MoE without shared experts has what Mixtral has, and biases and dense blocks."""
    _, found = read_config(config_of("Mixtral-8x7B"), "config.json")
    for more in ({"model": {"moe_every": 2, "intermediate_size": 8}}, {"attention": {"bias": "inputs"}}):
        sections = found.sections()
        for name, values in more.items():
            sections[name] |= values
        wanted = architecture(sections, False)
        kind, written = family_of(wanted)
        assert kind == "qwen2_moe" and written["shared_expert_intermediate_size"] == 0
        assert read_config(written, "config.json")[1] == wanted


def changed(name: str, **settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: config_of(name) | settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda: [], "config.json: must be an object"),
        (lambda: {}, "config.json: model_type=None: is an unknown architecture; use one of mixtral, qwen3_moe, "),
        (changed("Mixtral-8x7B", model_type="gemma"), "config.json: model_type='gemma': is an unknown architecture; "),
        (changed("Mixtral-8x7B", model_type=["mixtral"]), "config.json: model_type=['mixtral']: is an unknown archite"),
        (changed("Mixtral-8x7B", hidden_act="relu"), "config.json: hidden_act='relu': is an unknown activation; use "),
        (changed("Mixtral-8x7B", router_jitter_noise=0.1), "config.json: router_jitter_noise=0.1: this router has no "),
        (changed("Mixtral-8x7B", hidden_size="4096"), "config.json: hidden_size='4096': must be a whole number of at "),
        (changed("Mixtral-8x7B", hidden_size=True), "config.json: hidden_size=True: must be a whole number of at "),
        (changed("Mixtral-8x7B", num_local_experts=-1), "config.json: num_local_experts=-1: must be a whole number "),
        (changed("Mixtral-8x7B", num_experts_per_tok=9), "config.json: top_k=9: must be at most num_experts=8"),
        (changed("Mixtral-8x7B", num_key_value_heads=5), "config.json: attention.num_kv_heads=5: must divide "),
        (
            changed("Mixtral-8x7B", rms_norm_eps="small"),
            "config.json: rms_norm_eps='small': must be a positive number ",
        ),
        (
            changed("Mixtral-8x7B", rope_scaling={"type": "dynamic"}),
            "config.json: rope_scaling: rope_type=None: is an ",
        ),
        (changed("Mixtral-8x7B", rope_parameters=[1]), "config.json: rope_parameters=[1]: must be an object"),
        (changed("Mixtral-8x7B", partial_rotary_factor=0.5), "config.json: partial_rotary_factor=0.5: this decoder "),
        (changed("Mixtral-8x7B", quantization_config={"bits": 4}), "config.json: quantization_config: quantised "),
        (changed("Mixtral-8x7B", attention_dropout=0.1), "config.json: attention_dropout=0.1: this decoder has no "),
        (
            changed("Qwen3-30B-A3B", hidden_act="gelu"),
            "config.json: hidden_act='gelu': dense feed-forwards and shared ",
        ),
        (
            changed("Qwen3-30B-A3B", mlp_only_layers=[3]),
            "config.json: mlp_only_layers=[3]: this decoder can have dense",
        ),
        (changed("Qwen3-30B-A3B", norm_topk_prob=1), "config.json: norm_topk_prob=1: must be true or false"),
        (changed("OLMoE-1B-7B", clip_qkv=8.0), "config.json: clip_qkv=8.0: this decoder does not clip queries, keys "),
        (changed("DeepSeek-V3", scoring_func="softmax"), "config.json: scoring_func='softmax': is an unknown router; "),
        (changed("DeepSeek-V3", topk_method="greedy"), "config.json: topk_method='greedy': is an unknown router; "),
        (changed("DeepSeek-V2", topk_method="noaux_tc"), "config.json: topk_method='noaux_tc': is an unknown router; "),
        (changed("DeepSeek-V3", rms_norm_eps=1e-5), "config.json: rms_norm_eps=1e-05: must be 1e-06, which "),
        (changed("DeepSeek-V3", rope_interleave=False), "config.json: rope_interleave=False: must be true, as in all "),
        (
            changed("DeepSeek-V3", moe_layer_freq=2),
            "config.json: moe_layer_freq=2: this decoder has MoE layers in all ",
        ),
        (changed("DeepSeek-V3", first_k_dense_replace=61), "config.json: first_k_dense_replace=61: must be less than "),
        (changed("DeepSeek-V3", num_key_value_heads=8), "config.json: num_key_value_heads=8: must be num_attention_"),
    ],
)
def test_what_is_refused(values: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        read_config(values(), "config.json")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_experts_per_tok")
_QWEN = (*_WIDTHS, "num_experts", "moe_intermediate_size", "num_key_value_heads", "decoder_sparse_step")
_DEEPSEEK = (
    *(*_WIDTHS, "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "first_k_dense_replace"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group"),
)
_WHOLE: dict[str, tuple[str, ...]] = {
    "mixtral": (*_WIDTHS, "num_local_experts", "num_key_value_heads", "head_dim"),
    "qwen2_moe": (*_QWEN, "shared_expert_intermediate_size"),
    "qwen3_moe": (*_QWEN, "head_dim"),
    "olmoe": (*_WIDTHS, "num_experts", "num_key_value_heads", "head_dim"),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), (*_WIDTHS[:-1], "num_key_value_heads", "head_dim")),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_number_is_so_large_that_reading_has_no_end(kind: str) -> None:
    for field in ("num_hidden_layers", "vocab_size", *_WHOLE[kind]):
        for value in (10**12, 10**400, -1):
            with pytest.raises(ValueError) as error:
                read_config(tiny(kind, **{field: value}), "config.json")
            text = str(error.value)
            assert text.startswith(f"config.json: {field}={str(value)[:70]}") and "must be a whole number of " in text
            assert "\n" not in text and len(text) < 250


def test_blocks_and_experts_are_limited_together() -> None:
    with pytest.raises(ValueError, match=r"^config.json: model.num_layers=10000: all blocks together have 655400000 "):
        read_config(tiny("qwen3_moe", num_hidden_layers=10_000, num_experts=65536), "config.json")
    many = list(range(10_000)) * 200
    with pytest.raises(ValueError, match=r"^config.json: mlp_only_layers=.*: this decoder can have dense"):
        read_config(tiny("qwen3_moe", num_hidden_layers=10_000, mlp_only_layers=many), "config.json")
    sections = read_config(tiny("mixtral"), "config.json")[1].sections()
    for field, value in (("num_layers", 10**12), ("num_layers", 0), ("num_heads", 10**12), ("num_heads", 0)):
        with pytest.raises(ValueError, match="^model.num_"):  # as in the manifest of a checkpoint
            architecture(sections | {"model": sections["model"] | {field: value}}, False)


_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = _YARN | {"type": "llama3", "high_freq_factor": 4.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("kind", "field", "scaling"),
    [
        ("qwen3_moe", "rms_norm_eps", None),
        ("qwen3_moe", "rope_theta", None),
        ("deepseek_v2", "routed_scaling_factor", None),
        ("deepseek_v3", "routed_scaling_factor", None),
        ("mixtral", "rope_theta", {"type": "default"}),
        ("mixtral", "factor", {"type": "linear"}),
        *(("mixtral", field, _YARN) for field in ("factor", "beta_fast", "beta_slow", "attention_factor")),
        *(("mixtral", field, _LLAMA3) for field in ("factor", "high_freq_factor", "low_freq_factor")),
        ("deepseek_v3", "mscale", _YARN | {"mscale_all_dim": 1.0}),
        ("deepseek_v3", "mscale_all_dim", _YARN),
    ],
)
def test_reals_must_be_positive(kind: str, field: str, scaling: dict[str, Any] | None) -> None:
    for value in (-1.0, 0, 1e300, 10**400, 1e-300, math.nan):
        if value == 0 and field.startswith("mscale"):
            continue
        more = {field: value} if scaling is None else {"rope_scaling": scaling | {field: value}}
        with pytest.raises(ValueError, match=rf"^config.json: .*{field}=.*: must be (0 or )?a positive number betwee"):
            read_config(tiny(kind, **more), "config.json")


@pytest.mark.parametrize(
    ("name", "section", "field", "value", "message"),
    [
        ("Mixtral-8x7B", "attention", "bias", "all", "mixtral, which cannot have attention.bias='all'"),
        (
            "Qwen3-30B-A3B",
            "moe",
            "shared_intermediate_size",
            8,
            "qwen3_moe, which cannot have moe.shared_intermediate_",
        ),
        ("DeepSeek-V3", "model", "norm_eps", 1e-5, "deepseek_v3: rms_norm_eps=1e-05: must be 1e-06, which "),
    ],
)
def test_a_model_that_no_family_has(name: str, section: str, field: str, value: Any, message: str) -> None:
    _, found = read_config(config_of(name), "config.json")
    sections = found.sections()
    sections[section][field] = value
    with pytest.raises(
        ValueError, match="^no model of transformers computes as this checkpoint's; the nearest is "
    ) as e:
        family_of(architecture(sections, found.expert_bias))
    assert message in str(e.value)


#: recipe -> family of its models; the others compute what no model of transformers does
EXPORTED = {
    **dict.fromkeys(("quickstart", "mixtral", "qwen3_global_batch", "mixtral_8x7b"), "mixtral"),
    **{"olmoe": "olmoe", "qwen3_30b": "qwen3_moe", "qwen3_235b": "qwen3_moe"},
    **{"deepseek_v2": "deepseek_v2", "deepseek_v3": "deepseek_v3", "kimi_k2": "deepseek_v3"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_can_be_exported_or_one_line_says_why_not(recipe: str) -> None:
    config = RECIPES[recipe]()
    sections = asdict(config)
    sections["model"]["vocab_size"] = 300

    def family() -> str:
        return family_of(architecture(sections, config.moe.balance.bias_update_rate > 0))[0]

    if recipe in EXPORTED:
        assert family() == EXPORTED[recipe]
        return
    with pytest.raises(ValueError, match="no model of transformers (computes as|has such)"):
        family()
