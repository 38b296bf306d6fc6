"""A linear layer with few outputs, each row a sum of its own.

Libraries split a matrix product with few columns along its rows, and add up in another order in another part: with a
fixed shape too, a row's last bits then depend on where in the batch it stands (measured with MKL on AVX-512, 4 x 2).
"""

from __future__ import annotations

import torch


class RowWise(torch.nn.Module):
    """(..., n) -> float32 (..., m), for small m: weight (m, n) and bias (m) of the given layer, multiplied in fp32."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The layer's outputs."""
        sums = (rows.float().unsqueeze(-2) * self.linear.weight.float()).sum(-1)
        return sums if self.linear.bias is None else sums + self.linear.bias.float()
