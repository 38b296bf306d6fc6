"""Brace expansion: as in bash, which the expected values are from."""

from __future__ import annotations

import pytest

from transforms.storage import braces


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", "a"),
        ("{00..02}", "00 01 02"),
        ("{8..11}", "8 9 10 11"),
        ("{08..11}", "08 09 10 11"),
        ("{1..010..4}", "001 005 009"),
        ("{3..1}", "3 2 1"),
        ("{-1..1}", "-1 0 1"),
        ("{a..c}", "a b c"),
        ("{a,b}{1..2}", "a1 a2 b1 b2"),
        ("x{a,}y", "xay xy"),
        ("{a,b{1..2}}", "a b1 b2"),
        ("{a}", "{a}"),
        ("{a,b", "{a,b"),
        ("a}b{c,d}", "a}bc a}bd"),
        ("{{0..1}}", "{0} {1}"),
        ("{a..1}", "{a..1}"),
        ("{}", "{}"),
        ("{0..5..0}", "0 1 2 3 4 5"),
    ],
)
def test_expanded(pattern: str, expected: str) -> None:
    assert braces.expanded(pattern) == expected.split(" ")


def test_the_number_of_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(braces, "MAX_NAMES", 6)
    assert len(braces.expanded("{0..2}{0..1}")) == 6
    for pattern in ("{0..6}", "{0..999999999999999999}", "{0..2}{0..2}", "{0..9}" * 99):
        with pytest.raises(braces.TooManyNames, match="more than 6 names"):
            braces.expanded(pattern)


def test_depth_is_bounded() -> None:
    with pytest.raises(braces.TooManyNames, match="nested"):
        braces.expanded("{a," * 5000 + "}" * 5000)
    for pattern in ("{" * 5000, "{a," * 5000, "{" * 5000 + "}" * 5000):
        assert braces.expanded(pattern) == [pattern]
