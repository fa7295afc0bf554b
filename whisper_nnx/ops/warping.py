"""Dynamic time warping: Giorgino 2009 (doi 10.18637/jss.v031.i07), with the simplest steps. Jitted."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_FAR = 1e30  # cost of what cannot be reached
DIAGONAL, DOWN, RIGHT = 0, 1, 2  # steps of the warping: next token and position, next token, next position


class _Sum(NamedTuple):
    """A sum in twice float32's precision: high + low. The costs of two paths often differ by less than float32 sees."""

    high: jax.Array
    low: jax.Array

    def plus(self, x: jax.Array) -> _Sum:
        """Knuth's exact addition of high and x, whose error joins low."""
        high = self.high + x
        added = high - self.high
        low = self.low + ((self.high - (high - added)) + (x - added))
        total = high + low
        return _Sum(total, low - (total - high))

    def less(self, other: _Sum) -> jax.Array:
        return (self.high < other.high) | ((self.high == other.high) & (self.low < other.low))

    def where(self, condition: jax.Array, other: _Sum) -> _Sum:
        return _Sum(*(jnp.where(condition, a, b) for a, b in zip(self, other, strict=True)))


def warp_by_diagonals(cost: jax.Array, counts: jax.Array) -> jax.Array:
    """`ops.first_positions` for counts [2] = n, m: a scan over the anti-diagonals, each a vector over the rows."""
    rows, columns = cost.shape
    row = jnp.arange(rows + 1)  # row and column 0 stand before the matrix
    column = jnp.arange(2, rows + columns + 1)[:, None] - row  # of each anti-diagonal [N+M-1,N+1]
    inside = (row >= 1) & (column >= 1) & (column <= columns)
    on_diagonal = cost[jnp.maximum(row - 1, 0), jnp.clip(column - 1, 0, columns - 1)]
    unreachable = _Sum(jnp.full(rows + 1, _FAR), jnp.zeros(rows + 1))

    def diagonal(carry: tuple[_Sum, _Sum], here: tuple[jax.Array, jax.Array]) -> tuple[tuple[_Sum, _Sum], jax.Array]:
        up_left, left = carry
        cost, inside = here
        up = _Sum(*jnp.roll(jnp.stack(left), 1, axis=1))  # each row sees the one above it
        is_diagonal = up_left.less(up) & up_left.less(left)
        is_down = up.less(up_left) & up.less(left)
        best = up_left.where(is_diagonal, up.where(is_down, left))
        step = jnp.where(is_diagonal, DIAGONAL, jnp.where(is_down, DOWN, RIGHT))
        return (up, best.plus(cost).where(inside, unreachable)), step.astype(jnp.int8)

    start = (unreachable._replace(high=unreachable.high.at[1].set(0.0)), unreachable)
    _, steps = jax.lax.scan(diagonal, start, (on_diagonal, inside))

    def back(carry: tuple[jax.Array, jax.Array, jax.Array], _: None) -> tuple[tuple, None]:
        i, j, first = carry
        first = jnp.where((row == i) & (i > 0), j - 1, first)
        step = jnp.where(j == 0, DOWN, jnp.where(i == 0, RIGHT, steps[jnp.maximum(i + j - 2, 0), i]))
        going = (i > 0) | (j > 0)
        i = jnp.where(going & (step != RIGHT), i - 1, i)
        j = jnp.where(going & (step != DOWN), j - 1, j)
        return (i, j, first), None

    end = (*counts, jnp.zeros(rows + 1, jnp.int32))
    (_, _, first), _ = jax.lax.scan(back, end, None, length=rows + columns)
    return first[1:]
