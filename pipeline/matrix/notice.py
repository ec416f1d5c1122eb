"""The notice that older versions put in the place of an output's metadata while they replaced the output."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Literal

import msgspec

from pipeline.matrix.conventions import ATTRIBUTE
from pipeline.storage.trust import decode

type Making = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{8}\Z")]
"""Name of an output while it is made."""


class _Ours(msgspec.Struct):
    making: Making = msgspec.field(name="replaced by")


class _Attributes(msgspec.Struct):
    ours: _Ours = msgspec.field(name=ATTRIBUTE)


class _Notice(msgspec.Struct):
    node_type: Literal["replacement"]
    """No node of Zarr: its readers fail, whereas they take a document without a type for a group."""
    attributes: _Attributes


def read_notice(document: bytes) -> str:
    """Read the name of the output that a notice announces; empty where the document is no notice."""
    with suppress(ValueError):
        return decode(document, _Notice).attributes.ours.making
    return ""
