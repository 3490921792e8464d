"""Measures the loss of a model on any text: ``python -m equimoe.launch.evaluate --run-dir runs/quickstart``.

Prints, for each domain, the loss in nats per token and the perplexity, with error bars: the standard deviation, and the
95 % interval, over bootstrap samples of the documents. Without --data, a run is evaluated on the text that it has held
out. A document begins with the end-of-document token, and is read in parts of --seq-len tokens. A model trained with
--data.documents separate sees that token only when it predicts a document's first one, as in training.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C loses nothing, and needs no traceback

import numpy as np
import torch

from ..moe.collectives import sum_over
from ..moe.observe.metrics import write_atomically
from ..moe.observe.printable import printable
from ..moe.serve import score, windows
from ..moe.train.config import DataConfig
from ..moe.train.data import Tokenizer, load_corpus, read_labelled
from . import env, loaded
from .tokens import TOKENS
from .usage import Parser, a_path, check_file, in_options

#: options that are fields of section ``data``
FIELDS = ("domain_by", "text_field", "domain_field", "token_dtype")


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with 64 for a wrong option, 66 for text that cannot be read, 67 for a damaged checkpoint."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(given)
    with loaded.this_rank() as process:
        for name, least in {"batch": 1, "limit": 1, "samples": 1, "seq_len": 1, "seed": 0}.items():
            if (value := getattr(arguments, name)) is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')}={value}: must be at least {least}")
        if arguments.json is not None and process.rank == 0:
            check_file("--json", arguments.json)
        source = loaded.find(arguments.run_dir)
        tokenizer = loaded.tokenizer_of(source, arguments.tokenizer, arguments.end_of_document)
        seq_len = arguments.seq_len or source.seq_len
        documents = _documents(arguments, source, tokenizer)
        experts = source.weights.architecture.moe.num_experts
        with loaded.ranks(process, arguments, experts, "equimoe.launch.evaluate", given) as mesh:
            model = loaded.build(source, mesh, process.device, seq_len, loaded.DTYPES[arguments.dtype])
            texts = [(domain, *text) for domain, of_domain in documents.items() for text in of_domain]
            parts = [w for n, (_, ids, scored) in enumerate(texts) for w in windows(n, ids, seq_len, scored)]
            sums_N2 = torch.zeros(len(texts), 2, dtype=torch.float64)
            dp = loaded.readers(mesh)
            end = loaded.end_of(source, tokenizer)
            for n, losses_S, _ in score(model, parts, end=end, batch=arguments.batch, dp=dp):
                sums_N2[parts[n].text] += torch.tensor([losses_S.sum(), len(losses_S)], dtype=torch.float64)
            sums_N2 = sum_over(sums_N2.to(process.device), dp).get().cpu()
            if process.rank == 0:
                found = summary([domain for domain, *_ in texts], sums_N2.numpy(), arguments.samples, arguments.seed)
                text = printable(arguments.data) if arguments.data else "held-out text"
                print(f"{printable(source.where)}, on {text}")
                print("\n".join(table(found)))
                if arguments.json is not None:
                    content = {"model": source.where, "data": arguments.data, "seq_len": seq_len, "domains": found}
                    write_atomically(arguments.json, json.dumps(content, indent=1).encode())


def _documents(arguments: argparse.Namespace, source: loaded.Source, tokenizer: Tokenizer) -> dict[str, list[Text]]:
    """Return the documents of every domain."""
    known = {field.name for field in fields(DataConfig)}
    settings: dict[str, Any] = {name: value for name, value in source.data.items() if name in known}
    settings |= {name: getattr(arguments, name) for name in FIELDS if getattr(arguments, name) is not None}
    if arguments.data is not None:
        settings |= {"path": arguments.data, "tokenizer": "bytes", "end_of_document": None}
    elif not source.data:
        raise ValueError("--data: is missing; only a run has held-out text")
    try:
        config = DataConfig(**settings)
    except ValueError as error:
        raise ValueError(in_options(error, FIELDS, {})) from None
    try:
        if arguments.data is not None:
            found: dict[str, list[Any]] = {**read_labelled(config, tokenizer)}
        else:
            corpus = load_corpus(config, tokenizer, _tokens(arguments.run_dir))
            found = {domain: [(ids, corpus.heldout_masks.get(domain))] for domain, ids in corpus.heldout.items()}
    except ValueError as error:
        own = {"path": "--data"} if arguments.data is not None else {}
        raise env.Refused(env.DATA, in_options(error, FIELDS, own)) from None
    end = tokenizer.end_of_document
    texts = {domain: [t for ids, mask in found[domain] for t in _texts(ids, mask, end)] for domain in found}
    texts = {domain: of_domain[: arguments.limit] for domain, of_domain in texts.items() if of_domain}
    if not texts:
        how = "has no text; give UTF-8 text, .jsonl or token files"
        raise env.Refused(env.DATA, f"--data={arguments.data}: {how}")
    return texts


def _tokens(path: Path) -> Path | None:
    """Return the folder with the tokens of the run that ``path`` is or belongs to; None if it has none."""
    return next((folder / TOKENS for folder in (path, *path.parents[:2]) if (folder / TOKENS).is_dir()), None)


#: ids after an end-of-document token, and which of the ids after the first are trained on; None: all
Text = tuple[list[int], list[bool] | None]


def _texts(stream: Any, mask: Any, end: int) -> list[Text]:
    """Cut a stream at its end-of-document tokens; each text begins with one. Those without a label are left out.

    ``mask`` is 1 for each id of the stream that is trained on; None: all are.
    """
    ids = np.asarray(stream[: len(stream)]).astype(np.int64)
    labelled = np.ones(len(ids), bool) if mask is None else np.asarray(mask[: len(mask)]).astype(bool)
    ends = np.flatnonzero(ids == end)
    found: list[Text] = []
    for part, scored in zip(np.split(ids, ends), np.split(labelled, ends), strict=True):
        scored = scored[part != end]
        if scored.any():
            found.append(([end, *part[part != end].tolist()], None if mask is None else scored.tolist()))
    return found


#: what is known about a domain; error bars are None if there is only one document or one bootstrap sample
Figures = dict[str, float | None]


def summary(domains: list[str], sums_N2: np.ndarray, samples: int, seed: int) -> dict[str, Figures]:
    """Return loss, perplexity and error bars of each domain and of "all", from the [loss, tokens] of each document.

    The error bars come from ``samples`` bootstrap samples: as many documents of each domain, drawn with replacement.
    """
    draw, found, drawn = np.random.default_rng(seed), {}, []
    for domain in dict.fromkeys(domains):
        own_N2 = sums_N2[[n for n, name in enumerate(domains) if name == domain]]
        sums_R2 = np.stack([own_N2[draw.integers(len(own_N2), size=len(own_N2))].sum(0) for _ in range(samples)])
        drawn.append(sums_R2)
        found[domain] = _figures(own_N2, sums_R2)
    found["all"] = _figures(sums_N2, np.sum(drawn, axis=0))
    return found


def _figures(sums_N2: np.ndarray, sums_R2: np.ndarray) -> Figures:
    total, tokens = sums_N2.sum(0)
    found: Figures = {"documents": len(sums_N2), "tokens": int(tokens), "loss": float(total / tokens)}
    std = low = high = None
    if len(sums_N2) > 1 and len(sums_R2) > 1:
        losses_R = sums_R2[:, 0] / sums_R2[:, 1]
        std, (low, high) = float(losses_R.std(ddof=1)), map(_exp, np.quantile(losses_R, [0.025, 0.975]))
    bars = {"loss_std": std, "perplexity": _exp(total / tokens), "perplexity_low": low, "perplexity_high": high}
    return found | bars


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def table(found: dict[str, Figures]) -> list[str]:
    """Format the result of :func:`summary`."""
    width = max(len(printable(name)) for name in [*found, "domain"])
    lines = [f"{'domain':<{width}}  {'documents':>9}  {'tokens':>11}  {'loss':>7}     std  perplexity   95 % interval"]
    for name, row in found.items():
        std, between = f"{'-':>6}", "-"
        if row["loss_std"] is not None:
            std, between = f"{row['loss_std']:.4f}", f"{row['perplexity_low']:.4g} to {row['perplexity_high']:.4g}"
        counts = f"{row['documents']:>9,}  {row['tokens']:>11,}"
        lines.append(
            f"{printable(name):<{width}}  {counts}  {row['loss']:>7.4f}  {std}  {row['perplexity']:>10.4g}   {between}"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m equimoe.launch.evaluate", description=f"{summary.split(':')[0]}. {' '.join(more.split())}"
    )
    loaded.add_options(parser)
    parser.add_argument("--data", metavar="PATH", help="text, .jsonl or token file, or a folder of such files")
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens to read at once; default the run's")
    for name in FIELDS:
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"as --data.{name} of the training command")
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N documents of each domain")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="bootstrap samples; default 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap samples; default 0")
    parser.add_argument("--batch", type=int, default=8, help="sequences that a rank reads together; default 8")
    parser.add_argument("--json", type=a_path, metavar="FILE", help="also write the result to this file")
    return parser


if __name__ == "__main__":
    main()
