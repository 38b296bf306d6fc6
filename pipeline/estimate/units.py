"""Units of quantities, parsed from texts such as `core s/sample`, `USD/vCPU h` or `GiB`.

Only time, data, money and operations are dimensions. Counted things (samples, workers, cores, "of the peak") have none,
as in SI: they are for the reader and do not take part in the arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

SECONDS_PER_HOUR = 3600
GIB = 2**30

_SCALES = {
    "s": ("time", 1),
    "h": ("time", SECONDS_PER_HOUR),
    "month": ("months", 1),  # prices of storage: a month has no fixed number of hours
    "byte": ("data", 1),
    "GB": ("data", 10**9),
    "GiB": ("data", GIB),
    "USD": ("money", 1),
    "FLOP": ("operations", 1),
}
"""The dimension of each unit, and its size in that dimension's smallest unit."""


class UnitError(ValueError):
    """Quantities whose units do not go together."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A product of powers of units: `powers` has (unit, exponent), sorted, without exponents of 0."""

    powers: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Unit:
        """The unit that `text` names: words before the first slash multiply, words after it divide."""
        numerator, _, denominator = text.partition("/")
        words = Counter(_words(numerator))
        words.subtract(_words(denominator))
        return cls.of(words)

    @classmethod
    def of(cls, exponents: Mapping[str, int]) -> Unit:
        """The unit with these exponents."""
        return cls(tuple(sorted((word, power) for word, power in exponents.items() if power)))

    def __mul__(self, other: Unit) -> Unit:
        exponents = Counter(dict(self.powers))
        exponents.update(dict(other.powers))
        return self.of(exponents)

    def __truediv__(self, other: Unit) -> Unit:
        exponents = Counter(dict(self.powers))
        exponents.subtract(dict(other.powers))
        return self.of(exponents)

    def __str__(self) -> str:
        above = " ".join(word for word, power in self.powers for _ in range(power))
        below = " ".join(word for word, power in self.powers for _ in range(-power))
        return f"{above or 1}/{below}" if below else above or "no unit"

    def convert(self, value: float, to: Unit) -> float:
        """`value` of this unit in the unit `to`. Raises UnitError if they measure different things."""
        dimensions: Counter[str] = Counter()
        multiply, divide = 1, 1
        for word, power in (self / to).powers:
            dimension, scale = _SCALES[word]
            dimensions[dimension] += power
            multiply *= scale ** max(power, 0)
            divide *= scale ** max(-power, 0)
        if any(dimensions.values()):
            raise UnitError(f"{self} cannot be converted to {to}")
        return value * multiply / divide if (multiply, divide) != (1, 1) else value


def _words(text: str) -> list[str]:
    words = ("byte" if word == "bytes" else word for word in text.split())
    return [word for word in words if word in _SCALES]
