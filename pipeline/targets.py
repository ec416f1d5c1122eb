"""What is verified or recorded: its name, where its files lie, which of them are metadata."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.arrays import open_node
from pipeline.errors import IntegrityError, NotFoundError, OpenError
from pipeline.matrix import local_folder
from pipeline.sources import split_name
from pipeline.storage import Folder, Objects

if TYPE_CHECKING:
    from collections.abc import Iterable

    import zarr

    from pipeline.storage import Storage

DOCUMENTS = {"zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"}
"""Names of metadata in Zarr."""


def locate_files(path: str | Path | zarr.Array[Any] | zarr.Group) -> tuple[str, Storage]:
    """Name of a target, and where its files lie."""
    if not isinstance(path, str | Path):
        node: Any = path
        folder = local_folder(node)
        prefix = f"{node.path}/" if node.path else ""
        return str(node.store_path), Objects(node.store, prefix) if folder is None else Folder(str(folder.absolute()))
    plain = split_name(str(path))[0]
    if not os.path.lexists(plain):
        raise NotFoundError(f"what is verified is there; nothing is at {path}; check the path")
    if plain.is_dir():
        return str(path), Folder(str(plain.absolute()))
    if not plain.is_file():
        raise OpenError(f"what is verified is a folder or a file; {path} is neither; name another")
    return str(path), Folder(str(plain.absolute().parent), plain.name)


def open_folder(folder: Folder, listed: Iterable[str]) -> zarr.Array[Any] | zarr.Group:
    """Open the Zarr array or group in a folder; OpenError where there is none."""
    documents = [key for key in listed if is_document(key)]
    if DOCUMENTS.isdisjoint(documents):
        raise OpenError(f"what is verified is a file, a Zarr array or a group; {folder.root} is a plain folder")
    for key in documents:
        try:
            # Zarr itself would wait for a FIFO's writer.
            with folder.open(key):
                pass
        except IntegrityError as error:
            raise OpenError(f"metadata can be read; {folder.root}/{key} {error}; restore it") from error
    return open_node(Path(folder.root))


def is_document(key: str) -> bool:
    """Tell whether a file holds metadata."""
    return key.rsplit("/", 1)[-1] in DOCUMENTS
