"""How well a part of a step, and the step before, have predicted the rest of a step.  E experts, M micro-batches.

After a fraction f of a step, the share of choices that each expert will get in the rest, u, can be predicted by that of
the part so far, x, or by that of the previous step, q; both are vectors over the experts. The prediction
(1 - w) x + w q has the expected square error

    (1 - w)^2 A + w^2 B + 2 w (1 - w) C,    A = E|x - u|^2,  B = E|q - u|^2,  C = E (x - u)(q - u),

which is least for w = (A - C) / (A + B - 2 C). With X = E|x - q|^2 = A + B - 2 C, this is

    w = (A + X - B) / (2 X),  limited to [0, 1].

A, B and X are measured in every step that ends, at several fractions, and averaged over steps with weights 1, 0.9,
0.81, ..., the newest first: data in any order are treated according to how they have behaved. As few steps say little,
the averages are mixed with what a simple model expects: that micro-batches are drawn independently around the load of
their step, which drifts from step to step. If v is the variance of a step's load because of its M micro-batches (the
variance between them, divided by M), and t the square of the drift,

    A = v (1/f + 1/(1-f)),    B = t + v (1 + 1/(1-f)),    X = t + v (1/f + 1).

v is measured within steps, and t is what the square difference of successive steps exceeds 2 v by. Before two steps
have ended, nothing is known of how they agree, and w is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: fractions of a step at which predictions are measured, in units of 1/BINS
BINS = 8
#: weight of a step relative to the next one, and of the model relative to measurements
DECAY, MODEL = 0.9, 0.1


class Agreement:
    """The averages of one layer. All ranks that count together have the same ones, without a collective of their own.

    ``values`` is fp64 [3, BINS - 1] (A, B, X at each fraction) and, flattened after it, v, the square difference of
    successive steps, and the total weights of the averages over steps and over pairs of steps.
    """

    SIZE = 3 * (BINS - 1) + 4

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(self.SIZE, dtype=torch.float64, device=device)

    def observe(self, totals_MX: Tensor, previous_X: Tensor | None) -> None:
        """Add a step that has ended: choices and tokens of its micro-batches, int64 [M, E + 1].

        ``previous_X`` has the choices, tokens and micro-batches of the step before, int64 [E + 2].
        """
        measured_3B, v, change, steps, pairs = self._split()
        many, counts_ME = len(totals_MX), totals_MX[:, :-1]
        step_E = _shares(counts_ME.sum(0))
        if previous_X is not None:
            q_E, exists = _shares(previous_X[:-2]), previous_X[-1] > 0  # after a resume, there may be none
            if many > 1:
                measured_3B, _ = _averaged(measured_3B, self._errors(counts_ME, q_E), pairs, exists)
            change, pairs = _averaged(change, (step_E - q_E).square().sum(), pairs, exists)
        if many > 1:
            apart = (_shares(counts_ME) - step_E).square().sum()
            v, steps = _averaged(v, apart / (many - 1) / many, steps)
        self.values = torch.cat((measured_3B.flatten(), torch.stack((v, change, steps, pairs))))

    def weight(self, fraction: float) -> Tensor:
        """Return w, the weight of the previous step in what is expected of the rest, when a ``fraction`` is known."""
        measured_3B, v, change, _, pairs = self._split()
        drift, begun, rest = (change - 2 * v).clamp_min(0), 1 / fraction, 1 / (1 - fraction)
        model_3 = torch.stack((v * (begun + rest), drift + v * (1 + rest), drift + v * (begun + 1)))
        a, b, x = _at(measured_3B, fraction) + MODEL * model_3
        return torch.where(pairs > 0, ((a + x - b) / (2 * x).clamp_min(1e-300)).clamp(0.0, 1.0), 0.0)

    def _split(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        measured_3B, rest = self.values[:-4].view(3, BINS - 1), self.values[-4:]
        return (measured_3B, *rest)

    @staticmethod
    def _errors(counts_ME: Tensor, q_E: Tensor) -> Tensor:
        """Return the square errors A, B and X of a step, [3, BINS - 1]."""
        many, so_far_ME = len(counts_ME), counts_ME.cumsum(0)
        x_NE, u_NE = _shares(so_far_ME[:-1]), _shares(so_far_ME[-1] - so_far_ME[:-1])
        pairs = ((x_NE, u_NE), (q_E, u_NE), (x_NE, q_E))
        errors_3N = torch.stack([(one - other).square().sum(-1).expand(many - 1) for one, other in pairs])
        # each fraction gets the mean over the positions that are nearest to it, or else the nearest position
        places = torch.arange(1, many, device=q_E.device) * (BINS / many)
        apart_BN = (places - torch.arange(1, BINS, device=q_E.device)[:, None]).abs()
        near_BN = (apart_BN <= apart_BN.amin(1, keepdim=True).clamp_min(0.5)).double()
        return errors_3N @ (near_BN / near_BN.sum(1, keepdim=True)).T


def _averaged(old: Tensor, new: Tensor, weight: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return an average with one more value, if that ``counts``, and the total weight."""
    total = DECAY * weight + 1
    found = (DECAY * weight * old + new) / total
    return (found, total) if counts is None else (torch.where(counts, found, old), torch.where(counts, total, weight))


def _at(values_3B: Tensor, fraction: float) -> Tensor:
    """Interpolate linearly between fractions."""
    place = min(max(fraction * BINS - 1, 0.0), BINS - 2.0)
    low = min(int(place), BINS - 3)
    return values_3B[:, low] + (place - low) * (values_3B[:, low + 1] - values_3B[:, low])


def _shares(counts_XE: Tensor) -> Tensor:
    """Return fp64 shares of the choices, which sum to 1 over the last dimension."""
    counts = counts_XE.double()
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)
