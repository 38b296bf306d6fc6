"""Names the format of a file from its first bytes, for messages about files that are not decoded."""

from __future__ import annotations

import re

_LOOKED_AT_BYTES = 1024

# In this order: the first pattern that matches names the file.
_FORMATS = tuple((re.compile(pattern, re.DOTALL), name) for pattern, name in (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"RIFF....WEBP", "WEBP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM", "BMP"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
    (rb"....ftyp(?:....)*?avi[fs]", "AVIF"),
    (rb"....ftyp(?:....)*?(?:hei[cfmsx]|hev[cmsx]|mif1|msf1)", "HEIC"),
    (rb"....ftyp", "MP4 video"),
    (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"\x00\x00\x01\x00[^\x00]", "an icon (ICO)"),
    (rb"8BPS", "Photoshop (PSD)"),
    (rb"\x76\x2f\x31\x01", "OpenEXR"),
    (rb".{128}DICM", "DICOM"),
    (rb"P[1-7]\s", "Netpbm"),
    (rb"qoif", "QOI"),
    (rb"DDS ", "DDS"),
    (rb"%PDF", "PDF"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "gzip data"),
    (rb"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>)?\s*(?:<!--.*?-->|<!DOCTYPE svg[^>]*>|\s)*<svg\b", "SVG"),
    (rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body)\b", "HTML"),
    (rb"(?:\xef\xbb\xbf)?\s*<\?xml", "XML"),
    (rb"(?:\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\]}]", "JSON"),
    (rb"[\t\n\r\x20-\x7e]+\Z", "text"),
))  # fmt: skip


def format_of(content: bytes) -> str | None:
    """Return the name of a file's format (Pillow's name where Pillow has one); None if it is not known."""
    start = content[:_LOOKED_AT_BYTES]
    return next((name for pattern, name in _FORMATS if pattern.match(start)), None)


def described(content: bytes) -> str:
    """Return what the bytes are, for a message: the format, else the first bytes."""
    if not content:
        return "empty"
    return format_of(content) or f"of an unknown format (it begins with {content[:8].hex(' ')})"
