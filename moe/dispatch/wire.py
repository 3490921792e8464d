"""Formats of rows on the wire.  S rows, D hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import PLAIN, Plain, Wire

#: largest finite value of e4m3
_MAX = 448.0


class BFloat16:
    """Rounded to bf16: 2 bytes per value, relative error at most 2^-9."""

    def encode(self, rows: Tensor) -> Tensor:
        return rows.to(torch.bfloat16)

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor:
        return payload.to(dtype)


class Float8:
    """e4m3 with an fp32 scale per row: D + 4 bytes per row; error at most 2^-4 of a value or 2^-10/448 of the largest.

    The scale brings the row's largest value to 448. A row with a value that is not finite arrives as NaN, whole (its
    scale is infinite or NaN), so that it does not look healthy. Bytes, because not every backend sends fp8.
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


#: name -> (to the experts, home). Results and gradients are never fp8: both are sums that later terms are added to, and
#: e5m2, which has the range for gradients, keeps two bits (DeepSeek-V3, arXiv 2412.19437, too combines in bf16)
WIRES: dict[str, tuple[Wire, Wire]] = {
    "compute": (PLAIN, PLAIN),
    "bf16": (Wire(BFloat16(), BFloat16()), Wire(BFloat16(), BFloat16())),
    "fp8": (Wire(Float8(), BFloat16()), Wire(BFloat16(), BFloat16())),
}

__all__ = ["WIRES", "BFloat16", "Float8", "Plain"]
