"""Batches from token streams: training batches, which depend only on step and seed, and held-out batches.

B sequences, S tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...config import require
from .corpus import Corpus
from .stream import Tokens


class Batches:
    """Selects the sequences of each step, for any number of ranks and micro-batches.

    Each domain's stream is split into sequences of ``seq_len`` labels; their inputs are the tokens one position
    earlier. Every token is thus a label once per epoch, except a stream's first token and a rest at its end that does
    not fill a sequence. Sequence i of a step has the number ``g = step * global_batch + i``; it is entry
    ``g % sequences`` of the permutation of epoch ``g // sequences``. There is no state: to resume, only the numbers are
    needed.

    ``train`` maps domains to token arrays of shape ``(T,)``, as :attr:`Corpus.train` does. Raises ``ValueError`` if
    there are fewer sequences than ``global_batch``.
    """

    def __init__(self, train: Mapping[str, Tokens], seq_len: int, global_batch: int, seed: int) -> None:
        require(seq_len >= 1, "data.seq_len", seq_len, "must be at least 1")
        require(global_batch >= 1, "data.global_batch", global_batch, "must be at least 1")
        require(seed >= 0, "seed", seed, "must not be negative")
        self.seq_len, self.global_batch, self.seed = seq_len, global_batch, seed
        self._streams = list(train.values())
        counts = [max(len(stream) - 1, 0) // seq_len for stream in self._streams]
        #: index of each domain's first sequence, followed by the number of all sequences
        self._bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        #: sequences per epoch
        self.sequences = int(self._bounds[-1])
        tokens = sum(map(len, self._streams))
        remedy = (
            f"the training text has fewer sequences of data.seq_len={seq_len}, {self.sequences} from {tokens} tokens; "
            "give more text or lower data.global_batch"
        )
        require(self.sequences >= global_batch, "data.global_batch", global_batch, remedy)
        self._orders: dict[int, np.ndarray] = {}

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

        Each is ``(inputs_BS, labels_BS, domain_B)``, int64, B = ``micro_batch``. The sequences of a step are ordered as
        [rank][micro-batch][sequence]. Raises ``ValueError`` if ``data_parallel * micro_batches * micro_batch`` is not
        the global batch.
        """
        asked = data_parallel * micro_batches * micro_batch
        remedy = f"data_parallel={data_parallel} * micro_batches={micro_batches} * micro_batch={micro_batch} is {asked}"
        require(asked == self.global_batch, "data.global_batch", self.global_batch, remedy + "; make them equal")
        require(0 <= rank < data_parallel, "rank", rank, f"must lie in [0, {data_parallel})")
        require(len(numbers) == asked, "numbers", len(numbers), f"must be the {asked} sequences of a step")
        mine = numbers[rank * micro_batches * micro_batch : (rank + 1) * micro_batches * micro_batch]
        return [self._gather(mine[i * micro_batch : (i + 1) * micro_batch]) for i in range(micro_batches)]

    def _gather(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        places = (divmod(g, self.sequences) for g in numbers)
        sequence_B = np.array([self._order(epoch)[place] for epoch, place in places])
        domain_B = np.searchsorted(self._bounds, sequence_B, side="right") - 1
        start_B = (sequence_B - self._bounds[domain_B]) * self.seq_len
        rows = [self._streams[d][s : s + self.seq_len + 1] for d, s in zip(domain_B, start_B, strict=True)]
        tokens = torch.from_numpy(np.stack([np.asarray(row) for row in rows]).astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.from_numpy(domain_B.astype(np.int64))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # a step spans at most two epochs
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) <= 1}
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._orders[epoch] = generator.permutation(self.sequences)
        return self._orders[epoch]


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

    Inputs and labels are int64; where the bool mask is False they are padding (0). Every rank of ``world`` gets the
    same number of batches with the same shapes and domains. Together the ranks see each evaluated token once. Domains
    with fewer than two held-out tokens are left out.
    """
    require(seq_len >= 1, "data.seq_len", seq_len, "must be at least 1")
    require(micro_batch >= 1, "data.micro_batch", micro_batch, "must be at least 1")
    require(0 <= rank < world, "rank", rank, f"must lie in [0, {world})")
    for domain, stream in corpus.heldout.items():
        starts = heldout_starts(len(stream), seq_len, sequences_per_domain)
        for first in range(0, len(starts), world * micro_batch):
            mine = starts[first + rank * micro_batch : first + world * micro_batch][:micro_batch]
            inputs_BS = torch.zeros(micro_batch, seq_len, dtype=torch.int64)
            labels_BS, mask_BS = torch.zeros_like(inputs_BS), torch.zeros_like(inputs_BS, dtype=torch.bool)
            for row, start in enumerate(mine):
                tokens = torch.from_numpy(stream[start : start + seq_len + 1].astype(np.int64))
                size = len(tokens) - 1
                inputs_BS[row, :size], labels_BS[row, :size], mask_BS[row, :size] = tokens[:-1], tokens[1:], True
            yield domain, inputs_BS, labels_BS, mask_BS
