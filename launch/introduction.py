"""What the training command prints before the first step."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sized

from ..moe.observe.printable import fitted, printable, short_count
from ..moe.parallel.degrees import DENSE_DEGREES, EXPERT_DEGREES
from ..moe.train.config import DataConfig
from ..moe.train.trainer import Trainer
from .options import Launch
from .text import counted

#: domains whose epochs are printed
DOMAINS = 20


def introduce(trainer: Trainer, launch: Launch, notes: list[str]) -> None:
    """Print the sizes of the model, the mesh and the text, and ``notes``."""
    corpus, config = trainer.corpus, trainer.config
    print(f"{launch.recipe}: {trainer.parameters:,} parameters, {trainer.active_parameters:,} active per token")
    number = len(trainer.moe_numbers)
    layers = f"{counted(number, 'MoE layer')} of {counted(config.moe.num_experts, 'expert')}, top-{config.moe.top_k}"
    print(
        f"{layers if number else 'no MoE layer'}; {counted(trainer.axis.size, 'rank')}{_degrees(trainer)}, "
        f"{counted(trainer.micro_batches, 'micro-batch')} per step"
    )
    kept, held = (sum(map(len, streams.values())) for streams in (corpus.train, corpus.heldout))
    print(f"text: {printable(_source(config.data))}")
    print(fitted(f"training: {short_count(kept)} tokens (", _sizes(corpus.train), end=")"))
    share = f"{held / (kept + held):.1%}"
    print(fitted(f"held out: {short_count(held)} tokens, {share} (", _sizes(corpus.heldout), end=")"))
    if corpus.folder is not None:
        print(f"tokens: {printable(str(corpus.folder))}, read when they are needed")
    print("\n".join(_plan(trainer)))
    if trainer.step:
        print(f"goes on after step {trainer.step}")
    for note in (*corpus.notes, *notes):
        print(f"note: {printable(note)}")
    if launch.dry_run:
        print("dry run: configuration and data fit together; nothing was trained or written")
    sys.stdout.flush()


def _plan(trainer: Trainer) -> list[str]:
    """Say how much of each domain the run reads."""
    config = trainer.config
    found = trainer.batches.epochs(config.steps)
    read = counted(config.steps * config.data.global_batch, "sequence")
    lines = [f"{counted(config.steps, 'step')}: {read} of {config.data.seq_len} tokens"]
    for domain, epochs in [*found.items()][:DOMAINS]:
        times = "each at most once" if epochs.most <= 1 else f"each up to {epochs.most} times"
        of = f"{epochs.epochs:.2g} epochs of {counted(epochs.sequences, 'sequence')}"
        lines.append(f"  {domain}: {epochs.share:.1%}, {of}, {times}")
    if len(found) > DOMAINS:
        lines.append(f"  and {counted(len(found) - DOMAINS, 'other domain')}")
    unread = [repr(domain) for domain in trainer.corpus.domains if domain not in found]
    return lines + ([fitted("  not trained on: ", unread)] if unread else [])


def _source(data: DataConfig) -> str:
    if data.path is not None:
        return data.path
    cap = data.builtin_bytes_per_domain
    return "built-in, from the Python installation" + (
        "" if cap is None else f", {short_count(cap)} bytes of each domain"
    )


def _sizes(streams: Mapping[str, Sized]) -> list[str]:
    return [f"{domain} {short_count(len(stream))}" for domain, stream in streams.items()]


def _degrees(trainer: Trainer) -> str:
    if trainer.mesh is None:
        return ""
    degrees = trainer.mesh.degrees
    split = {name: getattr(degrees, name) for name in (*DENSE_DEGREES, *EXPERT_DEGREES)}
    return f" ({degrees.data_parallel}, {', '.join(f'{name} {size}' for name, size in split.items() if size > 1)})"
