"""Rows that are summed by themselves."""

from __future__ import annotations

import pytest
import torch

from transforms.models.row_wise import RowWise


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layer_itself_but_for_the_order_of_adding_up(bias: bool):
    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(768, 2, bias=bias), torch.randn(16, 768)
    with torch.inference_mode():
        torch.testing.assert_close(RowWise(linear)(rows), linear(rows), atol=1e-5, rtol=0)
        assert RowWise(linear.bfloat16())(rows.bfloat16()).dtype == torch.float32


def test_a_rows_place_and_company_change_no_bit():
    torch.manual_seed(0)
    head, rows = RowWise(torch.nn.Linear(770, 2)), torch.randn(13, 770)
    with torch.inference_mode():
        together = head(rows)
        assert torch.equal(head(rows.flip(0)).flip(0), together)
        assert all(torch.equal(head(rows[i : i + 1]), together[i : i + 1]) for i in range(13))
