"""A linear layer with few outputs, whose result for a row does not depend on the row's position in the batch.

Libraries split a matrix product with few columns along its rows and sum in a different order in each part. Even with a
fixed shape, the last bits of a row then depend on its position (measured with MKL on AVX-512 for a 4 x 2 result).
"""

from __future__ import annotations

import torch


class RowWise(torch.nn.Module):
    """(..., n) -> float32 (..., m), for small m, with the weight (m, n) and bias (m,) of `linear`, computed in fp32."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the layer to `rows`."""
        sums = (rows.float().unsqueeze(-2) * self.linear.weight.float()).sum(-1)
        return sums if self.linear.bias is None else sums + self.linear.bias.float()
