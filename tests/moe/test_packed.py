"""Checks attention within the documents of packed sequences, and positions without a label."""

# B sequences, S positions, N query heads, M key/value heads, H width of a query or key head, W width of a value head.

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equimoe.moe import BalanceConfig, MoEConfig
from equimoe.moe.config import AttentionConfig, RotaryScaling
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.model import Decoder
from equimoe.moe.model.attend import WITHIN, attention_within, causal_attention
from equimoe.moe.model.documents import Documents, document_numbers, document_starts
from equimoe.moe.model.pregate import PreGated
from equimoe.moe.parallel import IGNORED
from tests.helpers import oracle
from tests.helpers.recorded import Recorded

LATENT = AttentionConfig("latent", q_lora_rank=6, kv_lora_rank=5, qk_nope_width=4, qk_rope_width=2, v_width=3)
KINDS = {
    "multi-head": AttentionConfig(),
    "grouped": AttentionConfig(num_kv_heads=2, qk_norm=True),
    "window": AttentionConfig(num_kv_heads=2, window=3, window_from=1),
    "yarn": AttentionConfig(num_kv_heads=2, scaling=RotaryScaling("yarn", 4.0, 8, score_scale=1.5)),
    "llama3": AttentionConfig(scaling=RotaryScaling("llama3", 4.0, 8, fast_turns=4.0)),
    "latent": LATENT,
    "latent, window, yarn": replace(LATENT, window=3, scaling=RotaryScaling("yarn", 4.0, 8)),
}
S, VOCABULARY = 24, 20
#: lengths of the documents of each sequence: several, single positions, and one that fills the sequence
LENGTHS = [[5, 1, 9, 1, 1, 7], [24], [1, 23], [12, 12]]


def numbers(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.tensor(of)) for of in lengths])


def decoder(attention: AttentionConfig, moe_every: int = 2, init_std: float = 0.4, coefficient: float = 0.0) -> Decoder:
    torch.manual_seed(0)
    moe = MoEConfig(16, 8, num_experts=4, top_k=2, init_std=init_std, balance=BalanceConfig(coefficient=coefficient))
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "num_layers": 4, "num_heads": 4, "intermediate_size": 16}
    return Decoder(**sizes, seq_len=S, moe=moe, moe_every=moe_every, attention=attention)


def ids_of(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, S), generator=torch.Generator().manual_seed(1))


# ---- which document a position belongs to


def test_the_end_belongs_to_the_document_that_it_ends() -> None:
    ids_BS = torch.tensor([[4, 5, 0, 6, 0, 0, 7], [0, 1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1, 0]])
    found_BS = document_numbers(ids_BS, end=0)
    assert found_BS.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1], [0] * 7]
    assert document_starts(found_BS).tolist() == [[0, 0, 0, 3, 3, 5, 6], [0, 1, 1, 1, 1, 1, 1], [0] * 7]
    assert Documents(document_starts(found_BS)).lengths == [3, 2, 1, 1, 1, 6, 7]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_a_new_number_starts_a_document(dtype: torch.dtype) -> None:
    numbers_BS = torch.tensor([[7, 7, 3, 3, 7], [0, 0, 0, 0, 0]], dtype=dtype)
    assert document_starts(numbers_BS).tolist() == [[0, 0, 2, 2, 4], [0] * 5]


# ---- the mathematics

SHAPES = {"equal heads": (4, 4, 6, 6), "grouped": (6, 2, 4, 4), "other values": (4, 1, 6, 3)}


def heads(shape: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return q, k, v, and the gradient of the output."""
    n, m, h, w = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    sizes = ((n, h), (m, h), (m, w), (n, w))
    return [torch.randn(len(LENGTHS), x, S, y, dtype=torch.float64, generator=generator).to(dtype) for x, y in sizes]


def run(way: str, shape: str, window: int | None, gradients: bool = True, device: str = "cpu") -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    *qkv, grad = (t.to(device) for t in heads(shape, torch.float32 if way == "blocks" else torch.float64))
    qkv = [t.requires_grad_(gradients) for t in qkv]
    out = WITHIN[way](*qkv, Documents(document_starts(numbers(LENGTHS)).to(device)), window)
    return [out.detach(), *(torch.autograd.grad(out, qkv, grad) if gradients else ())]


@pytest.mark.parametrize(("shape", "window"), list(product(SHAPES, (None, 1, 4, 50))))
def test_all_ways_equal_the_reference(shape: str, window: int | None) -> None:
    want = run("reference", shape, window)
    for way in ("one_by_one", "mask"):
        for got, right in zip(run(way, shape, window), want, strict=True):
            assert (got - right).abs().max() < 1e-12, way
    # on a CPU, FlexAttention has no gradient
    assert (run("blocks", shape, window, gradients=False)[0] - want[0]).abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernels need a GPU")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("width", [64, 192])
def test_blocks_on_a_gpu_equal_the_mask(width: int, window: int | None) -> None:
    torch.manual_seed(0)
    ids_BS = torch.randint(50, (2, 500), device="cuda")
    documents = Documents(document_starts(document_numbers(ids_BS, 0)))
    sizes = ((8, width), (2, width), (2, 64))
    qkv = [torch.randn(2, n, 500, w, device="cuda", requires_grad=True) for n, w in sizes]
    found = []
    for way in ("blocks", "mask"):
        out = WITHIN[way](*qkv, documents, window)
        found.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for got, right in zip(*found, strict=True):
        assert (got - right).norm() < 2e-2 * right.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sequence_that_is_one_document_has_the_bits_of_causal_attention(shape: str) -> None:
    q, k, v, _ = heads(shape, torch.float32)
    one = Documents(torch.zeros(len(q), S, dtype=torch.int64))
    assert torch.equal(attention_within(q, k, v, one), causal_attention(q, k, v))


# ---- in a decoder


@torch.no_grad()
@pytest.mark.parametrize(("kind", "moe_every"), list(product(KINDS, (0, 1))))
def test_changing_a_document_changes_no_bit_of_the_others(kind: str, moe_every: int) -> None:
    model = decoder(KINDS[kind], moe_every).eval()
    starts = document_starts(numbers(LENGTHS))
    ids = ids_of(len(LENGTHS))
    before = model(ids, None, starts)
    for b, s in ((0, 0), (0, 5), (0, 7), (2, 0), (3, 15)):
        other = ids.clone()
        other[b, s] = (ids[b, s] + 1) % VOCABULARY
        inside = torch.zeros_like(ids, dtype=torch.bool)
        inside[b] = starts[b] == starts[b, s]
        after = model(other, None, starts)
        assert torch.equal(after[~inside], before[~inside]), (b, s)
        assert not torch.equal(after[b, s], before[b, s])
        joined = model(other)
        assert s == S - 1 or not torch.equal(joined[b, s + 1 :], model(ids)[b, s + 1 :])


def alone(model: Decoder, ids: Tensor, lengths: list[list[int]]) -> Tensor:
    """Return the logits of every document read as a sequence of its own."""
    rows = []
    for row, of in zip(ids, lengths, strict=True):
        rows.append(torch.cat([model(document[None])[0] for document in row.split(of)]))
    return torch.stack(rows)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-6), (torch.float64, 1e-6)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_separate_sequences(kind: str, dtype: torch.dtype, limit: float) -> None:
    """Logits and all gradients. Rotary tables are fp32, so positions that do not restart differ by their rounding."""
    model = decoder(KINDS[kind], init_std=0.2).to(dtype).eval()
    ids = ids_of(len(LENGTHS))
    weight = torch.randn(len(LENGTHS), S, VOCABULARY, dtype=dtype, generator=torch.Generator().manual_seed(2))
    found = []
    for logits in (model(ids, None, document_starts(numbers(LENGTHS))), alone(model, ids, LENGTHS)):
        (logits * weight).mean().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for got, right in zip(*found, strict=True):
        assert oracle.relative_error(got, right) < limit, got.shape


def test_a_pre_gate_stays_within_documents() -> None:
    model = PreGated(decoder(AttentionConfig(), moe_every=1), 4, S).eval()
    ids, starts = ids_of(1), document_starts(numbers(LENGTHS[:1]))
    want = torch.cat([model(document[None])[0] for document in ids[0].split(LENGTHS[0])])
    assert oracle.relative_error(model(ids, starts=starts)[0], want) < 2e-6


# ---- in an engine


def sgd(model: nn.Module, *batches: Batch) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    optimizer = Recorded()
    engine = build_engine(model, None, optimizer)
    result = engine.step(list(batches), lr=0.1)
    return result.losses, optimizer.gradients[0], result


def test_an_engines_gradient_is_that_of_separate_sequences() -> None:
    """Documents of one length fit into a batch of separate sequences; labels that are left out change nothing else."""
    ids = ids_of(2)
    labels = ids.roll(-1, 1).masked_fill(ids % 3 == 0, IGNORED)
    documents = torch.arange(S).expand(2, S) // 8
    losses, packed, _ = sgd(decoder(KINDS["grouped"]).double(), Batch(ids, labels, documents=documents))
    apart, separate, _ = sgd(decoder(KINDS["grouped"]).double(), Batch(ids.view(6, 8), labels.view(6, 8)))
    assert torch.allclose(losses[0].view(6, 8), apart[0], atol=1e-6)
    assert not losses[0][labels == IGNORED].any() and losses[0][labels != IGNORED].all()
    assert all(torch.allclose(packed[name], separate[name], atol=1e-6) for name in separate)


def test_the_loss_is_the_mean_over_labels() -> None:
    """Micro-batches with few labels count by their labels; positions without one are routed like all others."""
    ids = ids_of(2)
    labels = ids.roll(-1, 1)
    labels[0, 2:] = IGNORED
    model = decoder(AttentionConfig()).double()
    logits = model(ids)
    want = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())  # torch ignores -100
    want.backward()
    right = {name: p.grad for name, p in model.named_parameters()}
    engine = build_engine(decoder(AttentionConfig()).double(), None, optimizer := Recorded())
    routed: list[int] = []
    layer = engine.parts[0].moe_layers()[0]
    layer.router.register_forward_hook(lambda _module, _args, routing: routed.append(int(routing.counts_BE.sum())))
    result = engine.step([Batch(ids[:1], labels[:1]), Batch(ids[1:], labels[1:])], lr=0.1)
    assert torch.allclose(torch.cat(result.losses).sum() / (labels != IGNORED).sum(), want)
    assert all(torch.allclose(optimizer.gradients[0][name], g, atol=1e-12) for name, g in right.items())
    assert routed == [2 * S, 2 * S]


def test_a_step_without_labels_trains_the_balance_alone() -> None:
    """Its loss is zero, not a division by zero; the routers still learn to balance."""
    ids = ids_of(2)
    model = decoder(AttentionConfig(), coefficient=0.1)
    losses, gradients, result = sgd(model, Batch(ids, torch.full_like(ids, IGNORED)))
    assert result.applied and not losses[0].any()
    assert all(g.isfinite().all() for g in gradients.values())
    assert not gradients["head.weight"].any()
    assert all(g.any() for name, g in gradients.items() if "router" in name)


class Plain(nn.Module):
    """A model that accepts anything, and would not notice documents."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, x: Tensor, mask: Tensor | None = None, **_: Any) -> Tensor:
        return self.embedding(x)


@pytest.mark.parametrize(
    ("model", "documents", "message"),
    [
        (Plain, numbers(LENGTHS), "batch.documents: a Plain does not take them; leave them out, or give its forward"),
        (
            lambda: decoder(AttentionConfig()),
            numbers(LENGTHS)[:, 1:],
            r"documents: torch.int64 of shape \(4, 23\); give integers of shape \(4, 24\)",
        ),
        (
            lambda: decoder(AttentionConfig()),
            numbers(LENGTHS).float(),
            "documents: torch.float32 of shape .*; give integers",
        ),
    ],
)
def test_documents_that_cannot_be(model: Any, documents: Tensor, message: str) -> None:
    ids = ids_of(len(LENGTHS))
    with pytest.raises(ValueError, match=message):
        sgd(model(), Batch(ids, ids, documents=documents))
