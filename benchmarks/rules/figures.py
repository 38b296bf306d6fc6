"""A measured share with its interval, and where the labelled sets are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binomtest

SETS = Path(__file__).parent / "sets"
SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@dataclass(frozen=True)
class Figure:
    """How many of a labelled set's samples one rule drops or finds.

    `question` says what is counted, for example "English captions dropped". `goal` is the share that we aim at, as
    text, for example "<= 0.01". `missing` says what a figure that was not measured needs; its counts are 0.
    """

    rule: str
    set_name: str
    question: str
    count: int = 0
    of: int = 0
    goal: str = ""
    missing: str = ""

    @property
    def share(self) -> float:
        """`count` over `of`."""
        return self.count / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the share."""
        low, high = binomtest(self.count, self.of).proportion_ci(0.95, method="wilson")
        return float(low), float(high)

    def cells(self) -> list[str]:
        """The row of the table."""
        names = [self.rule, self.set_name, self.question]
        if self.missing:
            return [*names, f"not measured: {self.missing}", "", "", self.goal]
        low, high = self.interval
        return [*names, f"{self.count} of {self.of}", f"{self.share:.4f}", f"{low:.4f} to {high:.4f}", self.goal]


@dataclass(frozen=True)
class Sources:
    """Where labelled sets are read from.

    `data` is the folder of the sets that are not part of the project; the pages on the rules name them. A set that is
    absent is reported as not measured.
    """

    data: Path = SHARED_DATA
