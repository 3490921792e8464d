"""A model class for the LM evaluation harness (package ``lm_eval``), for multiple choice and generation:

>>> import lm_eval
>>> from equimoe.launch.harness import EquiMoE
>>> lm_eval.simple_evaluate(model=EquiMoE("runs/quickstart"), tasks=["hellaswag"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..moe.serve import Sampling, Window, generate, score
from . import loaded


class EquiMoE(TemplateLM):
    """Scores and continues text with the model in a folder of a run, a checkpoint or a transformers model.

    * ``tokenizer``: path of a tokenizer.json, or "bytes"; by default the model's own.
    * ``end_of_document``: the token that ends a document; by default the model's own.
    * ``max_length``: tokens that the model reads at once; by default the sequence length of the run.
    * ``max_gen_toks``: new tokens of a continuation, unless the task says how many.

    Texts get no special tokens, except that one without a context begins with the beginning-of-text token, or with the
    end-of-document token if the model has none. Raises ValueError, or
    CheckpointError, if the folder has no model.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: str | None = None,
        end_of_document: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int = 8,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        super().__init__()
        source = loaded.find(Path(path))
        self.tokens = loaded.tokenizer_of(source, tokenizer, end_of_document)
        self.marks, self.end = loaded.marks(source, self.tokens), loaded.end_of(source, self.tokens)
        self.max_length, self.max_gen_toks = max_length or source.seq_len, max_gen_toks
        self.batch_size = batch_size
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = loaded.build(source, None, place, self.max_length, loaded.DTYPES[dtype])

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-document token."""
        return self.tokens.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without a context."""
        return self.marks.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return [int(token) for token in self.tokens.encode(string)]

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        several = []
        for number, (_texts, context, continuation) in enumerate(requests):
            ids = (context + continuation)[-(self.max_length + 1) :]
            several.append(Window(number, ids, max(len(ids) - len(continuation) - 1, 0)))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(several)
        for number, losses_S, best_S in score(self.model, several, end=self.end, batch=self.batch_size):
            found[number] = (-float(losses_S.sum()), bool(best_S.all()))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, which the model reads in parts of ``max_length`` tokens."""
        parts, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, windows):
                parts.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts up to one of the strings ``until`` of each request, which is not part of the result."""
        found = [""] * len(requests)
        groups: dict[tuple[int, float, float], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(number)
        for (tokens, temperature, top_p), numbers in groups.items():
            room = self.max_length - tokens
            if room < 1:
                raise ValueError(f"max_gen_toks={tokens}: leaves no room in max_length={self.max_length}; lower it")
            prompts = [(self.tok_encode(requests[n].args[0]) or [self.prefix_token_id])[-room:] for n in numbers]
            sampling = Sampling(tokens, temperature, top_p)
            texts = generate(self.model, prompts, sampling, stop=self.marks.stops, end=self.end, batch=self.batch_size)
            for place, number in enumerate(numbers):
                text = self.tokens.decode(np.array(texts[place]), skip_special=True)
                until = requests[number].args[1].get("until") or []
                for end in [until] if isinstance(until, str) else until:
                    text = text.split(end)[0] if end else text
                found[number] = text
        return found

    def _sampling(self, settings: dict[str, Any]) -> tuple[int, float, float]:
        tokens = int(settings.get("max_gen_toks", settings.get("max_new_tokens", self.max_gen_toks)))
        greedy = not settings.get("do_sample", float(settings.get("temperature", 0.0)) > 0)
        return tokens, 0.0 if greedy else float(settings.get("temperature", 1.0)), float(settings.get("top_p", 1.0))
