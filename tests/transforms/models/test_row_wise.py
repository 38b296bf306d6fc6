"""The row-wise linear layer."""

from __future__ import annotations

import pytest
import torch

from transforms.models.row_wise import RowWise


@pytest.mark.parametrize("bias", [True, False])
def test_results_equal_the_layer_up_to_the_order_of_summation(bias: bool):
    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(768, 2, bias=bias), torch.randn(16, 768)
    with torch.inference_mode():
        torch.testing.assert_close(RowWise(linear)(rows), linear(rows), atol=1e-5, rtol=0)
        assert RowWise(linear.bfloat16())(rows.bfloat16()).dtype == torch.float32


def test_a_result_does_not_depend_on_the_position_or_the_other_rows():
    torch.manual_seed(0)
    head, rows = RowWise(torch.nn.Linear(770, 2)), torch.randn(13, 770)
    with torch.inference_mode():
        together = head(rows)
        assert torch.equal(head(rows.flip(0)).flip(0), together)
        assert all(torch.equal(head(rows[i : i + 1]), together[i : i + 1]) for i in range(13))
