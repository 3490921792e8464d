"""Wire formats of rows.  S rows, D hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import PLAIN, Plain, Wire

#: largest finite value of e4m3
_MAX = 448.0


class BFloat16:
    """Sends rows as bf16: 2 bytes per value, relative error at most 2^-9."""

    def encode(self, rows: Tensor) -> Tensor:
        return rows.to(torch.bfloat16)

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor:
        return payload.to(dtype)


class Float8:
    """Sends rows as e4m3 with an fp32 scale per row: D + 4 bytes per row.

    The scale maps the row's largest value to 448. The error is at most 2^-4 of a value, or 2^-10/448 of the row's
    largest value. A row with a value that is not finite arrives as all NaN, because its scale is infinite or NaN; so
    the fault is not hidden. The payload is uint8, because not every backend can send fp8.
    """

    def encode(self, rows: Tensor) -> Tensor:
        wide_SD = rows.to(torch.promote_types(rows.dtype, torch.float32))
        largest_S = wide_SD.abs().amax(-1) if rows.numel() else wide_SD.sum(-1)
        tiny = torch.finfo(torch.float32).tiny
        scale_S = (largest_S / _MAX).clamp_min(tiny).float()
        small_SD = (wide_SD / scale_S[..., None]).clamp(-_MAX, _MAX).to(torch.float8_e4m3fn)
        return torch.cat((small_SD.view(torch.uint8), scale_S[..., None].view(torch.uint8)), dim=-1)

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor:
        small_SD = payload[..., :-4].view(torch.float8_e4m3fn)
        scale_S1 = payload[..., -4:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        wide = torch.promote_types(dtype, torch.float32)
        return (small_SD.to(wide) * scale_S1).to(dtype)


#: name -> (wire of dispatch, wire of combine). Results and gradients are never fp8: they enter sums, and e5m2, which
#: has the range that gradients need, keeps only two bits. DeepSeek-V3 (arXiv 2412.19437) combines in bf16 too.
WIRES: dict[str, tuple[Wire, Wire]] = {
    "compute": (PLAIN, PLAIN),
    "bf16": (Wire(BFloat16(), BFloat16()), Wire(BFloat16(), BFloat16())),
    "fp8": (Wire(Float8(), BFloat16()), Wire(BFloat16(), BFloat16())),
}

__all__ = ["WIRES", "BFloat16", "Float8", "Plain"]
