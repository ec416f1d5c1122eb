"""Which settings are nobody else's business: keys, passwords, tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.redaction import scrub

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
