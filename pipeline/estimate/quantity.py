"""Numbers that know their unit, their formula and the figures they are computed from.

    >>> samples = Quantity.named("samples", 1e9, "samples")
    >>> seconds = Quantity.named("cpu/decisions", 7.2e-05, "core s/sample")
    >>> hours = (samples * seconds).to("core h")
    >>> hours.value, hours.formula, hours.sources
    (20.0, 'samples × cpu/decisions', ('samples', 'cpu/decisions'))

Division is written ÷ because names of figures have slashes. Conversions of units do not appear in a formula.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable

from pipeline.estimate.units import Unit, UnitError

_SUM, _PRODUCT, _ATOM = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A value with its unit. `formula` says how it is computed; `sources` names the figures in the formula, in order of
    appearance; `precedence` is that of the formula's outermost operator."""

    value: float
    unit: Unit
    formula: str
    sources: tuple[str, ...] = ()
    precedence: int = _ATOM

    @classmethod
    def named(cls, name: str, value: float, unit: str) -> Quantity:
        """A figure, which formulas refer to by its name."""
        return cls(float(value), Unit.parse(unit), name, (name,))

    @classmethod
    def constant(cls, value: float, unit: str = "") -> Quantity:
        """A number that formulas show as it is."""
        return cls(float(value), Unit.parse(unit), str(int(value)) if value == int(value) else repr(value))

    def __add__(self, other: Operand) -> Quantity:
        return self._combine("+", operator.add, other, _SUM)

    def __sub__(self, other: Operand) -> Quantity:
        return self._combine("−", operator.sub, other, _SUM)

    def __mul__(self, other: Operand) -> Quantity:
        return self._combine("×", operator.mul, other, _PRODUCT)

    def __rmul__(self, other: float) -> Quantity:
        return _quantity(other) * self

    def __truediv__(self, other: Operand) -> Quantity:
        return self._combine("÷", operator.truediv, other, _PRODUCT)

    def to(self, unit: str) -> Quantity:
        """The same in another unit. Raises UnitError."""
        wanted = Unit.parse(unit)
        try:
            return dataclasses.replace(self, value=self.unit.convert(self.value, wanted), unit=wanted)
        except UnitError as error:
            raise UnitError(f"{self.formula}: {error}") from error

    def _combine(
        self, symbol: str, function: Callable[[float, float], float], other: Operand, precedence: int
    ) -> Quantity:
        right = _quantity(other)
        if precedence == _PRODUCT:
            unit = self.unit * right.unit if symbol == "×" else self.unit / right.unit
        else:
            unit = _common_unit(self, right)
        tightest = precedence + 1 if symbol in "−÷" else precedence
        formula = f"{self._within(precedence)} {symbol} {right._within(tightest)}"
        return Quantity(function(self.value, right.value), unit, formula, _sources(self, right), precedence)

    def _within(self, precedence: int) -> str:
        """The formula as an operand, in parentheses if it binds less tightly than `precedence`."""
        return self.formula if self.precedence >= precedence else f"({self.formula})"


Operand = Quantity | float


def total(quantities: Iterable[Quantity]) -> Quantity:
    """The sum of at least one quantity."""
    return functools.reduce(operator.add, quantities)


def apply(function: Callable[..., float], *operands: Operand, unit: str | None = None) -> Quantity:
    """`function` of the operands' values, in the formula `NAME(OPERANDS)`. Without `unit` the operands must share one,
    which is the result's."""
    quantities = [_quantity(operand) for operand in operands]
    value = float(function(*(quantity.value for quantity in quantities)))
    formula = f"{function.__name__}({', '.join(quantity.formula for quantity in quantities)})"
    result_unit = _common_unit(*quantities) if unit is None else Unit.parse(unit)
    return Quantity(value, result_unit, formula, _sources(*quantities))


def _quantity(operand: Operand) -> Quantity:
    return operand if isinstance(operand, Quantity) else Quantity.constant(operand)


def _common_unit(first: Quantity, *others: Quantity) -> Unit:
    for other in others:
        if other.unit != first.unit:
            raise UnitError(
                f"{first.formula} is in {first.unit}, {other.formula} is in {other.unit}; they must have the same unit"
            )
    return first.unit


def _sources(*quantities: Quantity) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for quantity in quantities for name in quantity.sources))
