"""The notice that stands in the place of an output's metadata while another takes it."""

from __future__ import annotations

import json
from contextlib import suppress

from pipeline.record import ATTRIBUTE

_KEY = "replaced by"
"""Beneath `ATTRIBUTE`: what takes the place of the output."""


def say_notice(making: str) -> bytes:
    """Metadata of no node that there is: who reads them fails, whereas Zarr takes any other object for a group.

    Examples
    --------
    >>> read_notice(say_notice("0123abcd"))
    '0123abcd'
    """
    attributes = {ATTRIBUTE: {_KEY: making}}
    return json.dumps({"zarr_format": 3, "node_type": "replacement", "attributes": attributes}).encode()


def read_notice(document: bytes) -> str:
    """What a notice names; empty where a document is none."""
    with suppress(ValueError, AttributeError, TypeError, KeyError, RecursionError):
        making = str(json.loads(document)["attributes"][ATTRIBUTE][_KEY])
        return making if document == say_notice(making) else ""
    return ""
