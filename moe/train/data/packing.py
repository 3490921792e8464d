"""Batches from token streams: training batches, which depend only on step and seed, and held-out batches.

B sequences, S tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...config import require
from ...parallel import IGNORED
from .corpus import Corpus
from .order import Epochs, Mixture, Sequential
from .stream import Tokens

#: (indices of domains, first positions, ids to read) -> ids, and loss masks or None, each [B, ids to read]
Read = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, "np.ndarray | None"]]


class Batches:
    """Selects the sequences of each step, for any number of ranks and micro-batches.

    Each domain's stream is split into sequences of ``seq_len`` labels; their inputs are the tokens one position
    earlier. Every token is thus a label once per epoch, except a stream's first token and a rest at its end that does
    not fill a sequence. Sequence i of a step has the number ``g = step * global_batch + i``. Without ``shares``, it is
    entry ``g % sequences`` of the permutation of epoch ``g // sequences``; with them, see :class:`.order.Mixture`.
    There is no state: to resume, only the numbers are needed.

    ``train`` maps domains to token arrays of shape ``(T,)``, as :attr:`Corpus.train` does, and ``masks`` some of them
    to their loss masks. Raises ``ValueError`` if there are fewer sequences than ``global_batch``, or none of a domain
    in ``shares``.
    """

    def __init__(
        self,
        train: Mapping[str, Tokens],
        seq_len: int,
        global_batch: int,
        seed: int,
        masks: Mapping[str, Tokens] | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        require(seq_len >= 1, "data.seq_len", seq_len, "must be at least 1")
        require(global_batch >= 1, "data.global_batch", global_batch, "must be at least 1")
        require(seed >= 0, "seed", seed, "must not be negative")
        self.seq_len, self.global_batch, self.seed = seq_len, global_batch, seed
        #: of each domain, and the loss mask of each; None: every id is trained on
        self.streams = list(train.values())
        self.masks = [None if masks is None else masks.get(domain) for domain in train]
        #: domain -> its sequences per epoch
        self.counts = {domain: max(len(stream) - 1, 0) // seq_len for domain, stream in train.items()}
        #: sequences of all domains
        self.sequences = sum(self.counts.values())
        tokens = sum(map(len, self.streams))
        remedy = (
            f"the training text has fewer sequences of data.seq_len={seq_len}, {self.sequences} from {tokens} tokens; "
            "give more text or lower data.global_batch"
        )
        require(self.sequences >= global_batch or bool(shares), "data.global_batch", global_batch, remedy)
        counts = list(self.counts.values())
        self.order = Sequential(counts, seed) if shares is None else Mixture(self.counts, shares, seed)
        #: reads sequences from the streams; a reader that works ahead may take its place
        self.fetch: Read = self.read_streams

    def sample(
        self, step: int, rank: int, data_parallel: int, micro_batches: int, micro_batch: int
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the micro-batches that ``rank`` of ``data_parallel`` reads in ``step``, see :meth:`read`."""
        require(step >= 0, "step", step, "must not be negative")
        first = step * self.global_batch
        return self.read(range(first, first + self.global_batch), rank, data_parallel, micro_batches, micro_batch)

    def read(
        self, numbers: Sequence[int], rank: int, data_parallel: int, micro_batches: int, micro_batch: int
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the micro-batches that ``rank`` of ``data_parallel`` reads of a step with these sequence ``numbers``.

        Each is ``(inputs_BS, labels_BS, domain_B)``, int64, B = ``micro_batch``; labels that are not trained on are
        :data:`IGNORED`. The sequences of a step are ordered as [rank][micro-batch][sequence]. Raises ``ValueError`` if
        ``data_parallel * micro_batches * micro_batch`` is not the global batch.
        """
        asked = data_parallel * micro_batches * micro_batch
        remedy = f"data_parallel={data_parallel} * micro_batches={micro_batches} * micro_batch={micro_batch} is {asked}"
        require(asked == self.global_batch, "data.global_batch", self.global_batch, remedy + "; make them equal")
        require(0 <= rank < data_parallel, "rank", rank, f"must lie in [0, {data_parallel})")
        require(len(numbers) == asked, "numbers", len(numbers), f"must be the {asked} sequences of a step")
        domain_B, start_B = self.places(self.share_of(numbers, rank, data_parallel))
        tokens_BS, mask_BS = self.fetch(domain_B, start_B, self.seq_len + 1)
        tokens = torch.from_numpy(tokens_BS.astype(np.int64))
        labels = tokens[:, 1:].contiguous()
        if mask_BS is not None:
            labels.masked_fill_(torch.from_numpy(mask_BS[:, 1:] == 0), IGNORED)
        parts = (tokens[:, :-1].contiguous(), labels, torch.from_numpy(domain_B))
        return list(zip(*(part.split(micro_batch) for part in parts), strict=True))

    @staticmethod
    def share_of(numbers: Sequence[int], rank: int, data_parallel: int) -> Sequence[int]:
        """Return the numbers of the sequences of a step that ``rank`` of ``data_parallel`` reads."""
        size = len(numbers) // data_parallel
        return numbers[rank * size : (rank + 1) * size]

    def places(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the domain of each sequence, and where it starts in the domain's stream, int64 [B]."""
        found = np.array([self.order.place(number) for number in numbers], np.int64).reshape(-1, 2)
        return found[:, 0].copy(), found[:, 1] * self.seq_len

    def read_streams(
        self, domain_B: np.ndarray, start_B: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Read ``size`` ids from each of these places, and their loss masks; None if no domain has one."""
        places = list(zip(domain_B.tolist(), start_B.tolist(), strict=True))
        tokens = np.stack([np.asarray(self.streams[d][s : s + size]).astype(np.uint32) for d, s in places])
        if all(mask is None for mask in self.masks):
            return tokens, None
        masks = [self.masks[d] for d, _ in places]
        one = np.ones(size, np.uint8)
        rows = [one if m is None else np.asarray(m[s : s + size]) for m, (_, s) in zip(masks, places, strict=True)]
        return tokens, np.stack(rows)

    def epochs(self, steps: int) -> dict[str, Epochs]:
        """Say, for each domain that is read, how much of it ``steps`` steps read."""
        return self.order.epochs(list(self.counts), steps * self.global_batch)


def heldout_starts(tokens: int, seq_len: int, sequences: int | None) -> np.ndarray:
    """Return the start positions of the evaluated sequences, evenly spaced over a held-out stream of ``tokens`` tokens.

    ``sequences=None`` returns all sequences; the last one may be shorter than ``seq_len``.
    """
    available = -(-max(tokens - 1, 0) // seq_len)
    count = available if sequences is None else min(sequences, available)
    return np.arange(count, dtype=np.int64) * available // max(count, 1) * seq_len


def heldout_batches(
    corpus: Corpus,
    seq_len: int,
    sequences_per_domain: int | None,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield ``(domain, inputs_BS, labels_BS, mask_BS)`` domain by domain, B = ``micro_batch``, S = ``seq_len``.

    Inputs and labels are int64; where the bool mask is False they are padding (0). Labels that are not trained on are
    :data:`IGNORED`. Every rank of ``world`` gets the same number of batches with the same shapes and domains. Together
    the ranks see each evaluated token once. Domains with fewer than two held-out tokens are left out.
    """
    require(seq_len >= 1, "data.seq_len", seq_len, "must be at least 1")
    require(micro_batch >= 1, "data.micro_batch", micro_batch, "must be at least 1")
    require(0 <= rank < world, "rank", rank, f"must lie in [0, {world})")
    for domain, stream in corpus.heldout.items():
        trained = corpus.heldout_masks.get(domain)
        starts = heldout_starts(len(stream), seq_len, sequences_per_domain)
        for first in range(0, len(starts), world * micro_batch):
            mine = starts[first + rank * micro_batch : first + world * micro_batch][:micro_batch]
            inputs_BS = torch.zeros(micro_batch, seq_len, dtype=torch.int64)
            labels_BS, mask_BS = torch.zeros_like(inputs_BS), torch.zeros_like(inputs_BS, dtype=torch.bool)
            for row, start in enumerate(mine):
                tokens = torch.from_numpy(stream[start : start + seq_len + 1].astype(np.int64))
                size = len(tokens) - 1
                inputs_BS[row, :size], labels_BS[row, :size], mask_BS[row, :size] = tokens[:-1], tokens[1:], True
                if trained is not None:
                    ignored = torch.from_numpy(np.asarray(trained[start + 1 : start + 1 + size]) == 0)
                    labels_BS[row, :size].masked_fill_(ignored, IGNORED)
            yield domain, inputs_BS, labels_BS, mask_BS
