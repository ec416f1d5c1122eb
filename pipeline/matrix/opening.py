"""Several matrices that share their rows, such as features and labels; and opening one or several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from pipeline.arguments import check_text, show
from pipeline.errors import InputError, OpenError
from pipeline.formatting import format_size, html_table, text_line
from pipeline.matrix.arrays import refuse_group
from pipeline.matrix.attributes import dimension_names
from pipeline.matrix.conventions import ATTRIBUTE
from pipeline.matrix.formats import is_numeric, refuse_options
from pipeline.matrix.matrix import FoundGroup, Matrix, open_found, open_single
from pipeline.storage.locations import Url, plain, store_error
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import zarr
    from numpy.typing import DTypeLike, NDArray
    from zarr.abc.store import Store

    from pipeline.matrix.matrix import MissingChunks

_LISTED = 10
"""Arrays that an error lists at most."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MatrixGroup:
    """Matrices that share their rows, by name. Picklable; made by `open_matrix`."""

    path: str
    """Where they lie, as the user named it."""
    members: dict[str, Matrix]
    """At least one, each of `rows` rows."""

    @property
    def rows(self) -> int:
        """Number of rows, of each."""
        return self._first.rows

    @property
    def nbytes(self) -> int:
        """Bytes of all in memory."""
        return sum(each.nbytes for each in self.members.values())

    @property
    def parts(self) -> NDArray[np.int64] | None:
        """(m, 2), [first, stop) rows of each source that was stacked, where all members agree; else None."""
        parts = [each.parts for each in self.members.values()]
        first = parts[0]
        agree = first is not None and all(each is not None and np.array_equal(each, first) for each in parts)
        return first if agree else None

    def check_length(self, length: int) -> int:
        """Return `length` as an int, or raise InputError where no window of it fits."""
        return self._first.check_length(length)

    def inputs(self) -> list[Path | Url]:
        """Files, folders and URLs that reading depends on: no output may touch them."""
        return [place for each in self.members.values() for place in each.inputs()]

    def facts(self) -> dict[str, str]:
        """What a person wants to know, as words."""
        facts = {
            "arrays": f"{len(self.members)} that share {self.rows:,} rows",
            "size": format_size(self.nbytes),
        }
        for name, each in self.members.items():
            shape = ", ".join(f"{size:,}" for size in each.shape)
            chunks = each.facts()["chunks"]
            facts[name] = f"({shape}) {each.dtype.name}, {format_size(each.nbytes)}; chunks {chunks}"
            if each.scaling:
                facts[name] += f"; {each.scaling}"
        if self.parts is not None:
            facts["parts"] = f"{len(self.parts)}"
        return facts

    @property
    def _first(self) -> Matrix:
        return next(iter(self.members.values()))

    def __repr__(self) -> str:
        return text_line(f"MatrixGroup({self.path!r})", self.facts())

    def _repr_html_(self) -> str:
        return html_table(f"MatrixGroup {self.path}", self.facts())


@overload
def open_matrix(
    source: Mapping[str, Any],
    *,
    storage_options: Mapping[str, Any] | None = None,
    check_reads: bool = False,
    missing_chunks: MissingChunks = "error",
    members: Sequence[str] | None = None,
) -> MatrixGroup: ...


# What a path leads to is known when it is opened: `Any` lets callers who know it, too, go on without a check.
@overload
def open_matrix(
    source: str | Path | Url | zarr.Array[Any] | zarr.Group | Store | Sequence[str | Path],
    *,
    storage_options: Mapping[str, Any] | None = None,
    check_reads: bool = False,
    missing_chunks: MissingChunks = "error",
    dtype: DTypeLike | None = None,
    row_shape: Sequence[int] | None = None,
    dataset: str | None = None,
    members: Sequence[str] | None = None,
) -> Matrix | Any: ...


def open_matrix(
    source: Any,
    *,
    storage_options: Mapping[str, Any] | None = None,
    check_reads: bool = False,
    missing_chunks: MissingChunks = "error",
    dtype: DTypeLike | None = None,
    row_shape: Sequence[int] | None = None,
    dataset: str | None = None,
    members: Sequence[str] | None = None,
) -> Matrix | MatrixGroup | Any:
    """Open a matrix, or several that share their rows, reading metadata only.

    Parameters
    ----------
    source
        Path or URL (`s3://`, `gs://`, `az://`, `https://`, and what fsspec knows) of a Zarr array, v2 or v3, of at
        least one dimension and numeric dtype; or an open `zarr.Array`; or an open Zarr store with such an array at its
        root, such as that of an Icechunk session. Or a file that is read in place, since its rows lie as plain bytes:
        `.npy`, raw binary, HDF5 with a contiguous data set (`file.h5::dataset`). Several such files, as a list, are
        stacked by rows, and their borders kept as `matrix.parts`.

        Several arrays of equally many rows: a mapping of names to any of these, or to a `Matrix`. Or a Zarr group,
        whose members are the numeric arrays directly in it, but for coordinates: 1-D arrays that are named as their
        dimension, and those along another dimension than the rows.
    storage_options
        Of a URL, for the library that reads it (obstore, or fsspec): region, endpoint, credentials. They go to the
        workers. What is not given is taken from the environment, and for S3 from `~/.aws`, by each worker for itself.
    check_reads
        Whether to read every chunk that a window touches whole, or inner chunk of a shard, and check it against its
        checksum: a damaged one is then an error, never a wrong value.
    missing_chunks
        `"fill"`: chunks that a Zarr array lacks read as its fill value. Default: they are an error.
    dtype, row_shape
        Of raw binary, and of nothing else.
    dataset
        Name of the HDF5 data set, of each file; not needed where a file holds only one.
    members
        Names of the arrays of a group that are wanted, coordinates among them. Default: as above.

    Returns
    -------
    Matrix
        Or, of a group or a mapping, a `MatrixGroup`.

    Raises
    ------
    NotFoundError
        If nothing lies at the path; nothing is created there.
    OpenError
        If it cannot be parsed, or is truncated; if it is a file whose rows cannot be read in place: in Fortran order,
        of another byte order, compressed or chunked; if it is a group without such arrays, or a result of ours.
    InputError
        If the array has no rows or no numbers, an argument does not fit the source, or parts do not agree; if reads
        cannot be checked, for want of checksums; if arrays of a group differ in their rows.

    Examples
    --------
    >>> import numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(6.0).reshape(3, 2))
    >>> pipeline.open_matrix(folder / "A.npy").shape
    (3, 2)
    >>> matrix = pipeline.create_matrix(folder / "A.npy", folder / "A.zarr")
    >>> pipeline.open_matrix(folder / "A.zarr").shape
    (3, 2)

    Features, and a label for each row:

    >>> numpy.save(folder / "y.npy", numpy.array([0, 1, 1]))
    >>> both = pipeline.open_matrix({"features": folder / "A.zarr", "labels": folder / "y.npy"})
    >>> both.rows, both.members["labels"].row_shape
    (3, ())
    """
    reading: dict[str, Any] = {"check_reads": check_reads, "missing_chunks": missing_chunks}
    options: dict[str, Any] = {"dtype": dtype, "row_shape": row_shape, "dataset": dataset}
    if isinstance(source, Mapping):
        refuse_options("a mapping", "several", **options)
        return _open_mapping(_choose(source, members, "the mapping"), storage_options, reading)
    found = open_found(source, storage_options=storage_options, **reading, **options)
    if isinstance(found, FoundGroup):
        refuse_options(found.name, "a Zarr group, whose arrays have their own", **options)
        return _open_group(found, members, reading)
    if members is not None:
        raise InputError(f"--member is for a Zarr group (members=); {found.path} is one matrix; drop it")
    return found


def _open_mapping(
    sources: Mapping[str, Any], storage_options: Mapping[str, Any] | None, reading: dict[str, Any]
) -> MatrixGroup:
    opened: dict[str, Matrix] = {}
    for name, source in sources.items():
        if not isinstance(name, str) or not name:
            raise InputError(f"arrays of a group have names; got {show(name)}; give words such as features and labels")
        if isinstance(source, Matrix):
            if reading["check_reads"] or reading["missing_chunks"] != "error":
                raise InputError(
                    f"how a matrix is read is said where it is opened; {name!r} is open already; give its path, or "
                    "open it so"
                )
            opened[name] = source
            continue
        # Of those that are on a disk already, or open, options of a store are none.
        options = storage_options if isinstance(source, Url) or (isinstance(source, str) and "://" in source) else None
        opened[name] = open_single(source, storage_options=options, **reading)
    return make_group(", ".join(each.path for each in opened.values()), opened)


def make_group(path: str, members: dict[str, Matrix]) -> MatrixGroup:
    """Put matrices together; InputError where there is none, or they differ in their rows."""
    if not members:
        raise InputError("a group has at least one array; got none; name some, such as {'features': 'X.zarr'}")
    if len({each.rows for each in members.values()}) > 1:
        raise _differing(path, {name: each.shape for name, each in members.items()})
    return MatrixGroup(path, members)


def _differing(path: str, shapes: Mapping[str, tuple[int, ...]]) -> InputError:
    listed = [f"{name} has {shape[0]:,}" for name, shape in shapes.items()]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return InputError(
        f"arrays of a group share their rows; of {path}, {', '.join(listed[:_LISTED])}{more}; name those wanted with "
        f"--member (members=), or give a mapping of names to paths"
    )


def _open_group(found: FoundGroup, members: Sequence[str] | None, reading: dict[str, Any]) -> MatrixGroup:
    """Open the arrays of a Zarr group that share its rows, each as if it were named alone."""
    group, name, place = found
    ours = group.attrs.get(ATTRIBUTE)
    if isinstance(ours, dict) and ours.get("kind") == "windows" and members is None:
        refuse_group(group, name, "a matrix has rows, and those of a result are windows")
    arrays = _list_arrays(found)
    if members is not None:
        chosen = _choose(arrays, members, name)
    else:
        chosen = choose_members(arrays)
        if not chosen:
            if arrays:
                refuse_group(group, name, "a group has arrays of numbers that share rows")
            refuse_group(group, name, "a group has its arrays directly in it")
        if len({array.shape[0] for array in chosen.values()}) > 1:
            raise _differing(name, {each: array.shape for each, array in chosen.items()})
    opened = {}
    for each, array in chosen.items():
        source = array if place is None else place.child(each) if isinstance(place, Url) else f"{place}/{each}"
        opened[each] = open_single(source, **reading)
    return make_group(name, opened)


@pinned_config()
def _list_arrays(found: FoundGroup) -> dict[str, zarr.Array[Any]]:
    """Arrays directly in a group, by name, in order of their names."""
    import zarr

    group, name, _ = found
    if not group.store.supports_listing and group.metadata.consolidated_metadata is None:
        raise OpenError(
            f"the arrays of a group are listed; {name} cannot be; name them: a mapping such as "
            f"{{'features': '{name}/features'}}"
        )
    try:
        listed = dict(group.members())
    except Exception as error:  # noqa: BLE001 (a store raises what it likes)
        raise store_error("the arrays of a group can be listed", name, error) from plain(error)
    return {each: node for each, node in sorted(listed.items()) if isinstance(node, zarr.Array)}


def _choose[T](arrays: Mapping[str, T], members: Iterable[str] | None, name: str) -> dict[str, T]:
    """Those of these names; InputError where one is not there."""
    if members is None:
        return dict(arrays)
    if isinstance(members, str) or not isinstance(members, Iterable):
        raise InputError(f"members are names of arrays; got {show(members)}; give a list")
    wanted = [check_text("a member", each) for each in members]
    if absent := [each for each in wanted if each not in arrays]:
        held = ", ".join([str(each) for each in arrays][:_LISTED]) or "none"
        raise InputError(f"a member is an array of the group; {name} has no {absent[0]!r}; it has {held}")
    return {each: arrays[each] for each in wanted}


def choose_members(arrays: Mapping[str, zarr.Array[Any]]) -> dict[str, zarr.Array[Any]]:
    """Choose the arrays of a group that are matrices along its rows.

    All arrays of numbers with a dimension are, but for coordinates. Names of dimensions tell these, as xarray writes
    them: a 1-D array that is named as its dimension, and one along a dimension that is not the rows of any array of
    two dimensions or more.
    """
    tables = {name: array for name, array in arrays.items() if array.shape and is_numeric(np.dtype(array.dtype))}
    names = {name: dimension_names(array) for name, array in tables.items()}
    first = {dims[0] for dims in names.values() if len(dims) > 1 and dims[0] is not None}
    return {
        name: array
        for name, array in tables.items()
        if len(names[name]) > 1
        or names[name][0] is None
        or (names[name][0] != name and (not first or names[name][0] in first))
    }
