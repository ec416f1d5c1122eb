"""The one way in which text leaves the process: URLs without secrets, and no control characters of others."""

from __future__ import annotations

import re
import unicodedata

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


def plain_words(text: str) -> str:
    r"""Escape what a terminal would obey instead of showing, in names of others, say; line breaks, too.

    Examples
    --------
    >>> print(plain_words("a b\x1b[2J\n\u202ec"))
    a b\x1b[2J\n\u202ec
    """
    return text if text.isprintable() else "".join(map(_escape, text))


def plain_lines(text: str) -> str:
    """Escape as `plain_words` does in a text of several lines."""
    return "\n".join(map(plain_words, text.split("\n")))


def _escape(letter: str) -> str:
    if letter.isprintable() or unicodedata.category(letter) == "Zs":
        return letter
    return letter.encode("unicode_escape").decode()
