"""The one way in which text leaves the process: URLs without secrets, and no control characters of others."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

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


HIDDEN = "(not shown)"
_WORDS = (
    r"(?i:token(?!i[sz])|passw|(?<![a-z])pass(?![a-z])|passphrase|pgpass|pwd|secret(?!ar)|credential|"
    r"cookie(?!.?path)|signature|bearer|authorization|connection.?string|"
    r"(?:api|access|private|account|storage|customer|service.?account).?key|sas(?![a-z]))"
)
_NAMES = re.compile(_WORDS)
_TEXTS = re.compile(rf"-----BEGIN|://[^/@\s]+@|{_WORDS}[\w-]*['\"]?\s*[=:\s]\s*\S")
"""A certificate or key as text; a password in a URL; a line of a script that sets one."""


def is_secret(name: str, value: Any) -> bool:
    """Whether a setting's last name, or its value, speaks of a secret; a name of a file does not."""
    return value not in (None, "", False, True) and bool(_NAMES.search(name) or _TEXTS.search(str(value)))


def secret_settings(settings: Mapping[str, Any], *above: str) -> Iterator[str]:
    """Yield the dotted names of those of Dask's settings that are secret."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from secret_settings(value, *above, str(key))
        elif is_secret(str(key), value):
            yield ".".join((*above, str(key)))


def without_secrets(name: str, value: Any) -> Any:
    """Return a value that can be shown, at any depth."""
    if isinstance(value, Mapping):
        # Kubernetes lists variables by name and value.
        named = {"value": str(value["name"])} if {"name", "value"} <= value.keys() else {}
        return {key: without_secrets(named.get(key, str(key)), each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(name, each) for each in value]
    if is_secret(name, value):
        return HIDDEN
    return scrub(value) if isinstance(value, str) else value
