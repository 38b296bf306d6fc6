"""Parses the json of a sample within bounds, and keeps only the fields that are needed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from transforms.core.recipe import PoolSettings

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET_OR_COMMA = re.compile(r"([\[{])|([\]}])|,")


class UnusableJson(ValueError):
    """The json of a sample cannot be used; `reason` is the dead letter's code."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


def parse_fields(content: bytes, wanted: Collection[str], pool: PoolSettings) -> dict[str, Any]:
    """Return the fields of a JSON object that are in `wanted`, other than null. Raises UnusableJson.

    Values and depth are counted before parsing: a parser takes 24 times the bytes of short values in memory, and its
    own limit on depth depends on the depth of the call stack.
    """
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")
        _check_bounds(text, pool)
        found = json.loads(text)
    except UnusableJson:
        raise
    except ValueError as error:
        raise UnusableJson("undecodable_json", str(error)) from error
    if not isinstance(found, dict):
        raise UnusableJson("undecodable_json", f"expected a JSON object, got {type(found).__name__}")
    return {name: value for name, value in found.items() if name in wanted and value is not None}


def _check_bounds(text: str, pool: PoolSettings) -> None:
    brackets = text.count("[") + text.count("{")
    if brackets <= pool.max_json_depth and brackets + text.count(",") <= pool.max_json_values:
        return
    depth = values = 0
    for found in _BRACKET_OR_COMMA.finditer(_STRING.sub("", text)):  # what strings contain does not count
        values += found[2] is None
        depth += (found[1] is not None) - (found[2] is not None)
        if depth > pool.max_json_depth:
            message = f"lists and objects are nested too deeply; the recipe allows {pool.max_json_depth} levels"
            raise UnusableJson("json_too_deep", message)
        if values > pool.max_json_values:
            message = f"more than {pool.max_json_values:,} lists, objects and values; the recipe allows no more"
            raise UnusableJson("json_too_many_values", message)
