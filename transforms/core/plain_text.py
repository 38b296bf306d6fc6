"""The text of a caption that rules and models judge. The caption itself is kept as it is in every table."""

from __future__ import annotations

import html
import re
from html.entities import html5

VERSION = 1
"""Part of the cache keys: tables made with another version are computed again. Raise it when `plain_text` changes."""

_MAX_NESTED_REFERENCES = 3  # captions are often escaped twice: &amp;nbsp;
_REFERENCE = re.compile(
    r"&(?:#[0-9]{1,7}|#x[0-9a-f]{1,6}|([a-z][a-z0-9]*));|&(nbsp|amp|quot|lt|gt)(?![a-z0-9])"
)
# Lower-case names come last, so &eacute; wins over &Eacute;. The case of their text is folded anyway.
_NAMED = {name.lower(): text for name, text in sorted(html5.items()) if name.endswith(";")}

# The elements of the HTML standard, current and obsolete. Other words in angle brackets are text, such as <person>.
_ELEMENTS = (
    "a|abbr|acronym|address|applet|area|article|aside|audio|b|base|basefont|bdi|bdo|big|blink|blockquote|body|br|button|"
    "canvas|caption|center|cite|code|col|colgroup|data|datalist|dd|del|details|dfn|dialog|dir|div|dl|dt|em|embed|"
    "fieldset|figcaption|figure|font|footer|form|frame|frameset|h[1-6]|head|header|hgroup|hr|html|i|iframe|img|input|"
    "ins|kbd|label|legend|li|link|main|map|mark|marquee|menu|meta|meter|nav|nobr|noframes|noscript|object|ol|optgroup|"
    "option|output|p|param|picture|pre|progress|q|rp|rt|ruby|s|samp|script|section|select|slot|small|source|span|strike|"
    "strong|style|sub|summary|sup|svg|table|tbody|td|template|textarea|tfoot|th|thead|time|title|tr|track|tt|u|ul|var|"
    "video|wbr|xml|[a-z]+:[a-z]+"
)
_TAG = re.compile(
    rf"<(?:/?(?:{_ELEMENTS})(?=[\s/>])[^<>]*|[!?][^<>]*)>"
    rf"|<(?:{_ELEMENTS})\s[^<>=]*=[^<>]*$"  # cut off with the caption
)
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_CONTROL = re.compile(r"[^\S ]|[\x00-\x1f\x7f-\x9f]")
_MISREAD_MARK = "\u00ef\u00bb\u00bf"  # a byte-order mark of UTF-8, read as Latin-1


def plain_text(caption: str) -> str:
    """Return a caption without letter case, HTML and invisible characters, on one line.

    All case variants of a caption have the same plain text. Only the fold of its upper case has this property: `ß` has
    the upper case `SS`, and dotless `ı` has `I`. Character references become their characters, and tags become spaces.
    Byte-order marks, zero-width spaces, soft hyphens and direction marks are removed. Where there was HTML, white space
    is collapsed as HTML does; elsewhere it keeps its length, so that the caption is as long as DataComp's filter finds.
    """
    folded = _folded(caption)
    text = visible = _without_html(folded)
    if not text.isascii():
        visible = _INVISIBLE.sub("", text).removeprefix(_MISREAD_MARK)
    visible = _CONTROL.sub(" ", visible)
    return visible if text == folded else " ".join(visible.split())


def _folded(text: str) -> str:
    return text.upper().casefold()


def _without_html(text: str) -> str:
    if "&" in text:
        text = _unescaped(text)
    return _TAG.sub(" ", text) if "<" in text else text


def _unescaped(text: str) -> str:
    for _ in range(_MAX_NESTED_REFERENCES):
        found = _folded(_REFERENCE.sub(_character, text))
        if found == text:
            break
        text = found
    return text


def _character(reference: re.Match[str]) -> str:
    name = reference[1] or reference[2]
    return _NAMED.get(f"{name};", reference[0]) if name else html.unescape(reference[0])
