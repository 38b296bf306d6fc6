"""Units, and arithmetic that carries value, unit, formula and sources."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.estimate.quantity import Quantity, apply, total
from pipeline.estimate.units import Unit, UnitError

VALUES = {"a": 3.0, "b/x": 5.0, "c d": 7.0}
LEAVES = st.sampled_from([Quantity.named(name, value, "") for name, value in VALUES.items()])
OPERATORS: list[Callable[[Quantity, Quantity], Quantity]] = [
    lambda left, right: left + right,
    lambda left, right: left - right,
    lambda left, right: left * right,
    lambda left, right: apply(max, left, right),
    lambda left, right: apply(min, left, right),
    lambda left, right: left / apply(max, right, 2),  # not by zero
]
QUANTITIES = st.recursive(
    LEAVES, lambda part: st.builds(lambda do, left, right: do(left, right), st.sampled_from(OPERATORS), part, part)
)
UNITS = st.sampled_from(["s", "h", "bytes", "GiB", "USD/h", "FLOP/s", "core s/sample", "samples", "USD/GiB month"])


@given(QUANTITIES)
def test_a_formula_evaluates_to_its_value(quantity: Quantity) -> None:
    formula = quantity.formula.replace("×", "*").replace("÷", "/").replace("−", "-")
    for number, name in enumerate(VALUES):
        formula = formula.replace(name, f"v{number}") if name != "a" else formula
    names = {"a": VALUES["a"], **{f"v{number}": value for number, value in enumerate(VALUES.values())}}
    assert eval(formula, names) == pytest.approx(quantity.value, rel=1e-9, abs=1e-6)


@given(QUANTITIES)
def test_sources_are_the_names_in_the_formula(quantity: Quantity) -> None:
    bare = quantity.formula.replace("max", "").replace("min", "")
    assert len(set(quantity.sources)) == len(quantity.sources)
    assert set(quantity.sources) == {name for name in VALUES if name in bare}


@given(UNITS, UNITS)
def test_units_multiply_and_divide(one: str, other: str) -> None:
    left, right = Unit.parse(one), Unit.parse(other)
    assert left * right / right == left and left * right == right * left
    assert Unit.parse(str(left * right)) == left * right


def test_names_of_counted_things_are_no_units() -> None:
    assert Unit.parse("core s/sample") == Unit.parse("s") and str(Unit.parse("core s/sample")) == "s"
    assert Unit.parse("pairs/s per GPU") == Unit.parse("1/s")
    assert Unit.parse("of the peak") == Unit.parse("samples") == Unit()


def test_conversions() -> None:
    assert Quantity.named("x", 7200, "core s").to("core h").value == 2
    assert Quantity.named("x", 2**31, "bytes").to("GiB").value == 2
    assert Quantity.named("x", 1, "GB").to("bytes").value == 10**9
    assert Quantity.named("x", 0.1, "h").to("worker h").value == 0.1
    assert Quantity.named("x", 1, "USD/s").to("USD/h").value == 3600
    with pytest.raises(UnitError, match="x: USD cannot be converted to h"):
        Quantity.named("x", 1, "USD").to("h")


def test_operands_of_a_sum_must_have_the_same_unit() -> None:
    hours, seconds = Quantity.named("a", 1, "h"), Quantity.named("b", 1, "s")
    for operation in (lambda: hours + seconds, lambda: hours - 1, lambda: apply(max, hours, seconds)):
        with pytest.raises(UnitError, match="they must have the same unit"):
            operation()


def test_a_price() -> None:
    vcpus, price = Quantity.named("vcpus", 8, "vCPUs/worker"), Quantity.named("price", 0.5, "USD/vCPU h")
    hours = Quantity.named("hours", 3, "worker h")
    cost = (vcpus * price * hours).to("USD")
    assert (cost.value, cost.formula, cost.sources) == (12, "vcpus × price × hours", ("vcpus", "price", "hours"))


def test_numbers_functions_and_sums() -> None:
    a, b = Quantity.named("a", 3, ""), Quantity.named("b", 4, "")
    assert (2 * (a + b)).formula == "2 × (a + b)"
    assert (a / (b / 2.5)).formula == "a ÷ (b ÷ 2.5)"
    assert (a - (b - a)).formula == "a − (b − a)"
    rounded = apply(math.ceil, a / b)
    assert (rounded.value, rounded.formula) == (1, "ceil(a ÷ b)")
    summed = total([a, b, a])
    assert (summed.value, summed.formula, summed.sources) == (10, "a + b + a", ("a", "b"))
    assert str(apply(math.sqrt, a, unit="FLOP").unit) == "FLOP"
