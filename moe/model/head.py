"""The decoder's last layer.  D hidden, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormHead(nn.Linear):
    """A linear layer without bias whose rows [V, D] have length 1 (NormHead of Ling, arXiv 2503.05139).

    Logits do not depend on the lengths of the rows, which training may therefore not use to favour frequent tokens.
    """

    def __init__(self, hidden_size: int, vocab_size: int, bias: bool = False) -> None:
        assert not bias
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # in at least fp32, also where the weight is a copy in bf16
        exact = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return F.linear(x, F.normalize(exact, dim=1).to(self.weight.dtype))
