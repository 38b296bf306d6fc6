"""Glob patterns as regular expressions."""

from __future__ import annotations

import re

_GLOB_TOKEN = re.compile(r"(?P<any>\*\*)|(?P<star>\*)|(?P<one>\?)|\[(?P<set>!?+\]?+[^\]]*+)\]|.", re.DOTALL)


def regex(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob pattern; `transforms.storage.files.matches` says what globs mean."""

    def translated(token: re.Match[str]) -> str:
        if token["any"]:
            return ".*"
        if token["star"]:
            return r"[^/\\]*"
        if token["one"]:
            return "."
        if token["set"] is None:
            return re.escape(token[0])
        content = token["set"].replace("\\", r"\\").replace("[", r"\[")
        if content.startswith("!"):
            content = f"^{content[1:]}"
        elif content.startswith("^"):
            content = f"\\{content}"
        return f"[{content}]"

    return re.compile(_GLOB_TOKEN.sub(translated, pattern), re.DOTALL)
