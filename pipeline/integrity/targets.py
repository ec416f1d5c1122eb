"""Target of `verify` and `write_manifest`: its name, where its files lie, which of them are metadata."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import IntegrityError, NotFoundError, OpenError
from pipeline.matrix.arrays import local_folder, open_node, open_root
from pipeline.matrix.formats import split_name
from pipeline.storage.base import Folder, Objects
from pipeline.storage.locations import Url, locate
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import zarr

    from pipeline.storage.base import Storage

DOCUMENTS = {"zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"}
"""Names of metadata in Zarr."""


def locate_files(
    path: str | Path | Url | zarr.Array[Any] | zarr.Group, storage_options: Mapping[str, Any] | None = None
) -> tuple[str, Storage]:
    """Name of a target, and where its files lie."""
    node: Any = path
    if hasattr(node, "store_path"):
        folder = local_folder(node)
        prefix = f"{node.path}/" if node.path else ""
        objects = Objects(node.store, prefix)
        return (objects.name, objects) if folder is None else (str(node.store_path), Folder(str(folder.absolute())))
    location = locate(node, storage_options)
    if isinstance(location, Url):
        from pipeline.storage.stores import open_store

        return str(location), Objects(open_store(location, read_only=True), "")
    plain = split_name(str(location))[0]
    if not os.path.lexists(plain):
        raise NotFoundError(f"{path} does not exist; check the path")
    if plain.is_dir():
        return str(path), Folder(str(plain.absolute()))
    if not plain.is_file():
        raise OpenError(f"{path} is neither a folder nor a regular file; choose another path")
    return str(path), Folder(str(plain.absolute().parent), plain.name)


@pinned_config()
def open_target(storage: Storage, listed: Iterable[str]) -> zarr.Array[Any] | zarr.Group:
    """Open the Zarr array or group whose files lie there; OpenError where there is none."""
    if isinstance(storage, Objects):
        import zarr

        if storage.prefix:
            return zarr.open(storage.store, path=storage.prefix.rstrip("/"), mode="r")
        return open_root(storage.store, storage.name)
    assert isinstance(storage, Folder)
    documents = [key for key in listed if is_document(key)]
    if DOCUMENTS.isdisjoint(documents):
        raise OpenError(f"{storage.root} is a folder without Zarr metadata; give a Zarr array, a Zarr group or a file")
    for key in documents:
        try:
            # Zarr itself would wait for a FIFO's writer.
            with storage.open(key):
                pass
        except IntegrityError as error:
            raise OpenError(f"the metadata {storage.root}/{key} {error}; restore it") from error
    return open_node(Path(storage.root))


def is_document(key: str) -> bool:
    """Tell whether a file holds metadata."""
    return key.rsplit("/", 1)[-1] in DOCUMENTS
