"""Unit vectors from stored embeddings, and inner products whose last bits do not depend on how work
was split."""

from __future__ import annotations

import numpy as np

NEAR = 1e-4
"""Inner products this near to a decision are judged again by `exact_products`. Our choice: however a
matrix product was split, a float32 product of unit vectors is off by at most d·2^-24, 4.6e-5 at
d = 768; what is met in practice is a hundredth of that."""

_BLOCK_ROWS = 4096


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows (n, d) of any float type divided by their length (taken in float64) → float32 (n, d).

    A row of zeros stays zero. Each row's result is its own, whatever stands beside it. Raises
    ValueError at a value that is not finite.
    """
    units = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS].astype(np.float64)
        squares = np.einsum("ij,ij->i", block, block)
        if not np.isfinite(squares).all():
            row = start + int(np.flatnonzero(~np.isfinite(squares))[0])
            raise ValueError(f"vector {row} holds a value that is not finite")
        units[start : start + _BLOCK_ROWS] = block / np.sqrt(np.where(squares > 0, squares, 1.0))[:, None]
    return units


def exact_products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Inner products of row i of `left` with row i of `right`, both (n, d) → float64 (n,).

    Products of float32 are exact in float64, and einsum adds them in an order that only d decides
    (a BLAS product's order also depends on threads and shape).
    """
    return np.einsum("ij,ij->i", left.astype(np.float64), right.astype(np.float64))


def exact_products_with(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Inner products of every row (n, d) with one vector (d,) → float64 (n,), as `exact_products`."""
    blocks = (rows[start : start + _BLOCK_ROWS] for start in range(0, len(rows), _BLOCK_ROWS))
    products = [exact_products(block, np.broadcast_to(vector, block.shape)) for block in blocks]
    return np.concatenate([np.empty(0), *products])
