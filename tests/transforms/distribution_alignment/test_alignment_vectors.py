"""Unit vectors and products of a row do not depend on other rows."""

import math

import numpy as np
import pytest

from transforms.distribution_alignment.vectors import (
    exact_products,
    exact_products_with,
    unit_rows,
)

ROWS = np.random.default_rng(1).normal(size=(37, 21)).astype(np.float32)


def test_unit_rows_have_length_1_and_do_not_depend_on_other_rows():
    units = unit_rows(ROWS)
    assert units.dtype == np.float32
    assert np.abs(np.linalg.norm(units.astype(np.float64), axis=1) - 1).max() < 1e-7
    alone = np.concatenate([unit_rows(ROWS[i : i + 1]) for i in range(len(ROWS))])
    assert np.array_equal(alone, units)


def test_a_row_of_zeros_stays_zero():
    assert not unit_rows(np.zeros((1, 3), np.float32)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_raises_with_its_row(value):
    rows = ROWS.copy()
    rows[5, 2] = value
    with pytest.raises(ValueError, match="vector 5 "):
        unit_rows(rows)


def test_exact_products_do_not_depend_on_how_rows_were_split():
    other = ROWS[::-1]
    products = exact_products(ROWS, other)
    alone = [exact_products(ROWS[i : i + 1], other[i : i + 1])[0] for i in range(len(ROWS))]
    assert products.tolist() == alone
    oracle = [
        math.fsum(float(a) * float(b) for a, b in zip(x, y, strict=True)) for x, y in zip(ROWS, other, strict=True)
    ]
    assert products == pytest.approx(oracle, rel=1e-14, abs=1e-14)
    assert exact_products_with(ROWS, ROWS[3])[5] == exact_products(ROWS[5:6], ROWS[3:4])[0]
