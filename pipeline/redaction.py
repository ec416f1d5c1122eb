"""The one way in which text with URLs leaves the process: without users, passwords, queries and fragments."""

from __future__ import annotations

import re

_REST = r"""\S*?(?=["',;:.)}>\]]*(?:\s|$))"""
"""To the end of a URL; what closes the text around it is left."""
_PARTS = re.compile(
    # Who asks, with a password or a token; but for the container of an Azure account. A path has one slash of the two.
    r"(?:(?<=//)|(?<=\w\w:/))(?:[^/\s]*:[^/\s]*@|(?<!abfs://)(?<!abfss://)(?<!az://)(?<!azure://)[^/\s]*@)"
    # Signatures; also of a path alone, as some libraries give it.
    rf"|(?<=\S)\?(?=[\w.~%\[\]-]+=){_REST}",
    re.IGNORECASE,
)
_TAILS = re.compile(rf"(\w\w:/[^\s?\"'<>]*)\?{_REST}|(https?:/[^\s#\"'<>]*)#{_REST}", re.IGNORECASE)


def scrub(text: str) -> str:
    """Take users, passwords, queries and fragments out of the URLs in a text.

    Examples
    --------
    >>> scrub("cannot read 'https://me:secret@example.org/A?signature=abc,d#e', at all")
    "cannot read 'https://example.org/A', at all"
    >>> scrub("is it? what?.npy, s3://bucket/A#1, abfs://container@account/A")
    'is it? what?.npy, s3://bucket/A#1, abfs://container@account/A'
    """
    return _TAILS.sub(r"\1\2", _PARTS.sub("", text))
