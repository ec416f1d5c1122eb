"""The notice that stands in the place of an output's metadata while another takes it."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated

import msgspec

from pipeline.matrix.conventions import ATTRIBUTE
from pipeline.storage.trust import decode

_KEY = "replaced by"
"""Beneath `ATTRIBUTE`: what takes the place of the output."""
type Making = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{8}\Z")]
"""Name of an output while it is made."""


class _Ours(msgspec.Struct):
    making: Making = msgspec.field(name=_KEY)


class _Attributes(msgspec.Struct):
    ours: _Ours = msgspec.field(name=ATTRIBUTE)


class _Notice(msgspec.Struct):
    attributes: _Attributes


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
    with suppress(ValueError):
        making = decode(document, _Notice).attributes.ours.making
        return making if document == say_notice(making) else ""
    return ""
