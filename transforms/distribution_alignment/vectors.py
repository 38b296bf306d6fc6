"""Unit vectors from stored embeddings, and inner products that are the same however the work was split."""

from __future__ import annotations

import numpy as np

NEAR = 1e-4
"""Inner products this close to a decision are computed again by `exact_products`. Our choice: however a matrix product
is split, the error of a float32 product of unit vectors is at most d·2^-24, which is 4.6e-5 for d = 768. Errors in
practice are a hundredth of that."""

_BLOCK_ROWS = 4096


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows (n, d) of any float type, divided by their length (computed in float64): float32 (n, d).

    A zero row stays zero. The result for a row does not depend on the other rows. Raises ValueError if a value is
    not finite.
    """
    units = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS].astype(np.float64)
        squares = np.einsum("ij,ij->i", block, block)
        if not np.isfinite(squares).all():
            row = start + int(np.flatnonzero(~np.isfinite(squares))[0])
            raise ValueError(f"vector {row} has a value that is not finite")
        units[start : start + _BLOCK_ROWS] = block / np.sqrt(np.where(squares > 0, squares, 1.0))[:, None]
    return units


def exact_products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Inner products of row i of `left` with row i of `right`, both (n, d): float64 (n,).

    Products of float32 values are exact in float64, and einsum sums them in an order that depends only on d. (The order
    in a BLAS product also depends on threads and shape.)
    """
    return np.einsum("ij,ij->i", left.astype(np.float64), right.astype(np.float64))


def exact_products_with(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Inner products of every row (n, d) with one vector (d,): float64 (n,), computed as by `exact_products`."""
    blocks = (rows[start : start + _BLOCK_ROWS] for start in range(0, len(rows), _BLOCK_ROWS))
    products = [exact_products(block, np.broadcast_to(vector, block.shape)) for block in blocks]
    return np.concatenate([np.empty(0), *products])
