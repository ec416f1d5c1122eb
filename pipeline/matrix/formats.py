"""Which format a source has, and how it is opened: `.npy`, HDF5, raw binary, Zarr or random numbers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.arguments import check_dtype, check_flag, check_path, check_shape, check_text, check_whole, is_whole, show
from pipeline.errors import InputError, NotFoundError, OpenError
from pipeline.matrix import hdf5, signatures
from pipeline.matrix.arrays import (
    check_decodable,
    count_nbytes,
    open_array,
    open_stored,
    reading_config,
)
from pipeline.matrix.conventions import decoding
from pipeline.matrix.sources import FileSource, RandomSource, Source, StackedSource, ZarrSource
from pipeline.storage.files import FileStamp
from pipeline.storage.locations import Url, locate, name_store

if TYPE_CHECKING:
    import zarr
    from numpy.typing import DTypeLike

_HDF5_SUFFIXES = {".h5", ".hdf5", ".he5", ".nc", ".nwb"}
FILE_SUFFIXES = _HDF5_SUFFIXES | {".npy", ".npz", ".mat"}
"""Of files that are no folder of Zarr."""
_RANDOM = "random:"


def open_source(
    source: str | os.PathLike[str] | zarr.Array[Any] | Sequence[str | os.PathLike[str] | zarr.Array[Any]],
    *,
    dtype: DTypeLike | None = None,
    row_shape: Sequence[int] | None = None,
    dataset: str | None = None,
    axis: int = 0,
    seed: int = 0,
    outside_files: bool = False,
) -> Source:
    """Open a source that a matrix can be made from; no data are read, and nothing is created.

    Parameters
    ----------
    source
        ``.npy``; HDF5, also as ``file.h5::dataset``; the folder or URL of a Zarr array, or a `zarr.Array`; any other
        file is raw binary; ``random:ROWSxCOLS`` is uniform in [0, 1). A sequence of them is stacked by rows. What a
        file holds decides, not its name: archives, netCDF-3 and other formats are named and refused, those that four
        bytes or more tell also where `dtype` and `row_shape` are given.
    dtype
        Of raw binary, such as ``">f4"``; of random numbers float64 (the default) or float32.
    row_shape
        Shape of one row of raw binary; ``()`` where a row is one number.
    dataset
        The data set in each HDF5 file; not needed where a file holds only one.
    axis
        Axis of each source that holds the rows; negative ones count from the last.
    seed
        Of random numbers, in [0, 2**64).
    outside_files
        Whether an HDF5 file may take values from files outside its folder: links, virtual data sets, external storage.

    Returns
    -------
    Source
        A `StackedSource`, which has `parts`, exactly if `source` is a sequence.

    Raises
    ------
    InputError
        If an argument does not fit the source, the array has no numbers or no rows, or parts differ: in their shape,
        dtype, or scaling.
    NotFoundError
        If a file or data set is not there, or one that HDF5 takes values from.
    OpenError
        If a file cannot be opened or is cut off, holds pickles, or more than one array.
    IntegrityError
        If a file that HDF5 takes values from is too short, or its data set too small.

    Examples
    --------
    >>> open_source("random:2000000x2000").shape
    (2000000, 2000)
    """
    if not is_whole(axis):
        raise InputError(f"axis {show(axis)} is not a whole number; give 0 for the first axis")
    if dataset is not None:
        check_text("dataset", dataset)
    seed = check_whole("seed", seed, least=0)
    options = _Options(dtype, row_shape, dataset, int(axis), seed, check_flag("outside_files", outside_files))
    if isinstance(source, str | os.PathLike) or not isinstance(source, Sequence):
        return _open_one(source, options)
    if not source:
        raise InputError("the list of sources is empty; name at least one file")
    sources = tuple(_open_one(part, options) for part in source)
    meanings = [decoding(each.labels.attributes, each.dtype) for each in sources]
    for part, opened, meaning in zip(source, sources, meanings, strict=True):
        for what, first, other in (
            ("row shape", sources[0].shape[1:], opened.shape[1:]),
            ("dtype", sources[0].dtype, opened.dtype),
        ):
            if first != other:
                raise InputError(
                    f"{_name(source[0])} has {what} {first}, {_name(part)} has {what} {other}: stacked sources must "
                    "agree; convert one of them"
                )
        for name in sorted(meaning.items() ^ meanings[0].items()):
            raise InputError(
                f"{_name(part)} has {name[0]} {meaning.get(name[0], 'not')}, {_name(source[0])} "
                f"{meanings[0].get(name[0], 'not')}: their numbers mean different values; convert one of them"
            )
    return StackedSource(sources)


def referred_files(source: Source) -> list[Path]:
    """List the other files that a source takes values from, sorted by path."""
    parts = source.sources if isinstance(source, StackedSource) else (source,)
    found = (part.data.references for part in parts if isinstance(part, hdf5.Hdf5Source))
    return sorted({reference.stamp.path.resolve() for references in found for reference in references})


@dataclass(frozen=True, slots=True)
class _Options:
    dtype: DTypeLike | None
    row_shape: Sequence[int] | None
    dataset: str | None
    axis: int
    seed: int
    outside_files: bool

    def refuse(self, source: str, kind: str, *names: str) -> None:
        """Raise `InputError` if one of the options is given for a kind of source that has its own, or none."""
        refuse_options(source, kind, **{name: getattr(self, name) for name in names})

    def parse_dtype(self) -> np.dtype[Any]:
        dtype = check_dtype(self.dtype)
        if dtype.hasobject:
            raise InputError(f"dtype {show(self.dtype)} is not a number; write float32 or >f4")
        return dtype


def refuse_options(source: str, kind: str, **options: Any) -> None:
    """Raise `InputError` if one of `dtype`, `row_shape`, `dataset` is given for a kind of source that has its own."""
    for name, value in options.items():
        if value is not None:
            owner = "HDF5" if name == "dataset" else "raw binary"
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is for {owner}, and {source} is {kind}; leave {flag} out")


def _open_one(source: str | os.PathLike[str] | zarr.Array[Any], options: _Options) -> Source:
    if not isinstance(source, str | os.PathLike):
        return _open_zarr(source, options)
    text = os.fspath(check_path("a source", source))
    if text.startswith(_RANDOM) and not Path(text).exists():
        return _open_random(text, options)
    location = locate(source)
    if isinstance(location, Url):
        return _open_url(location, options)
    path, name = split_name(str(location))
    try:
        return _open_path(path, name, options)
    except FileNotFoundError as error:
        if isinstance(error, NotFoundError):
            raise
        raise NotFoundError(f"{path} does not exist; give the name of a file or folder") from error
    except OSError as error:
        if isinstance(error, OpenError):
            raise
        raise OpenError(f"{path} cannot be read: {error.strerror}; check its permissions") from error


def _open_url(url: Url, options: _Options) -> ZarrSource:
    from pipeline.storage.stores import open_store

    if url.suffix.lower() in FILE_SUFFIXES or "::" in url.name or options.dtype is not None:
        raise OpenError(f"{url} is a file, and only Zarr arrays are read from URLs; copy it to a local disk first")
    return _open_zarr(open_stored(open_store(url, read_only=True), str(url)), options)


def _open_path(path: Path, name: str | None, options: _Options) -> Source:
    if path.is_dir():
        if name is not None:
            raise InputError(f"{path} is a folder, and FILE::NAME is for HDF5; write {path / name.lstrip('/')}")
        return _open_zarr(open_array(path), options)
    # Opening a pipe would wait for a writer.
    if path.exists() and not path.is_file():
        raise OpenError(f"{path} is neither a file nor a folder; copy it to a file")
    with path.open("rb") as file:
        is_npy, user_block, foreign = signatures.is_npy(file), signatures.find_hdf5(file), signatures.recognize(file)
    # An archive of an HDF5 file has a superblock where a user block would end.
    if foreign is not None and foreign.is_sure:
        raise _foreign(path, foreign)
    if not is_npy and (user_block is not None or path.suffix.lower() in _HDF5_SUFFIXES):
        return _open_hdf5(path, name, options)
    if name is not None:
        raise InputError(f"{path} is not HDF5, and FILE::NAME is for HDF5; leave ::{name} out")
    if is_npy or path.suffix.lower() == ".npy":
        return _open_npy(path, options)
    if foreign is not None and (options.dtype is None or options.row_shape is None):
        raise _foreign(path, foreign)
    return _open_raw(path, options)


def _foreign(path: Path, foreign: signatures.Format) -> OpenError:
    return OpenError(f"{path} is {foreign.name}, not plain numbers; {foreign.way_out}")


def _open_npy(path: Path, options: _Options) -> FileSource:
    options.refuse(str(path), "a .npy file", "dtype", "row_shape", "dataset")
    stamp = FileStamp.take(path)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"format version {version} is for structured dtypes")  # noqa: TRY301
            shape, fortran, dtype = readers[version](file)
        except (ValueError, SyntaxError, TypeError) as error:
            raise OpenError(
                f"{path} has no valid .npy header: {_first_line(error)}; write it again with numpy.save"
            ) from error
        offset = file.tell()
    axis = _check_array(str(path), shape, dtype, options.axis)
    source = FileSource(stamp, offset, shape, dtype, fortran, axis, alone=True)
    _check_size(source)
    return source


def _open_raw(path: Path, options: _Options) -> FileSource:
    if options.dtype is None or options.row_shape is None:
        raise InputError(
            f"{path} is not .npy, HDF5 or Zarr, and raw binary needs a dtype and the shape of a row; "
            "add --dtype and --row-shape, such as --dtype float32 --row-shape 2000"
        )
    options.refuse(str(path), "raw binary", "dataset")
    dtype = options.parse_dtype()
    row_shape = check_shape("row_shape", options.row_shape)
    _check_array(str(path), (1, *row_shape), dtype, 0)
    stamp = FileStamp.take(path)
    rows, remainder = divmod(stamp.size, math.prod(row_shape) * dtype.itemsize)
    if remainder:
        raise OpenError(
            f"{path} has {stamp.size} bytes: {rows} rows of {row_shape} {dtype} and {remainder} bytes more; "
            "check --dtype and --row-shape"
        )
    shape = (rows, *row_shape)
    axis = _check_array(str(path), shape, dtype, options.axis)
    return FileSource(stamp, 0, shape, dtype, fortran=False, axis=axis, alone=True)


def _open_hdf5(path: Path, name: str | None, options: _Options) -> FileSource | hdf5.Hdf5Source:
    options.refuse(str(path), "HDF5", "dtype", "row_shape")
    if name is not None and options.dataset is not None:
        raise InputError(f"{path}::{name} and --dataset {options.dataset} both name a data set; leave one out")
    name = name if name is not None else options.dataset
    data = hdf5.describe(path, name, outside_files=options.outside_files)
    axis = _check_array(f"{path}::{data.name}", data.shape, data.dtype, options.axis)
    if data.offset is None:
        return hdf5.Hdf5Source(data, axis)
    source = FileSource(
        data.stamp,
        data.offset,
        data.shape,
        data.dtype,
        fortran=False,
        axis=axis,
        alone=False,
        stored_labels=data.labels,
    )
    _check_size(source)
    return source


def _open_zarr(array: zarr.Array[Any], options: _Options) -> ZarrSource:
    import zarr

    if not isinstance(array, zarr.Array):
        raise InputError(f"{type(array).__name__} is not a path, a zarr.Array or a list of them; save it first")
    name = name_store(array.store_path)
    options.refuse(name, "a Zarr array", "dtype", "row_shape", "dataset")
    axis = _check_array(name, array.shape, np.dtype(array.dtype), options.axis)
    array = reading_config(array)
    chunk_rows = min(check_decodable(array, name)[axis], array.shape[axis])
    return ZarrSource(array, axis, chunk_rows, count_nbytes(array))


def _open_random(text: str, options: _Options) -> RandomSource:
    spec = text.removeprefix(_RANDOM)
    if not re.fullmatch(r"[0-9]{1,18}(x[0-9]{1,18})*", spec):
        raise InputError(f"{text!r} is not of the form random:ROWSxCOLS; write random:100000x500")
    options.refuse(text, "random", "row_shape", "dataset")
    if options.axis != 0:
        raise InputError(
            f"axis {options.axis} does not apply to random numbers, whose rows come first; leave --axis out"
        )
    if not 0 <= options.seed < 2**64:
        raise InputError(f"seed {show(options.seed)} is outside [0, 2**64); choose another")
    dtype = np.dtype(np.float64) if options.dtype is None else options.parse_dtype()
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise InputError(f"dtype {dtype} does not apply to random numbers; choose float64 or float32")
    shape = tuple(int(n) for n in spec.split("x"))
    _check_array(text, shape, dtype, 0)
    return RandomSource(shape, dtype, options.seed)


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Whether values are numbers that a matrix can hold: Zarr has no name for floats of more than 64 bits."""
    return dtype.kind in "biufc" and dtype.itemsize <= (16 if dtype.kind == "c" else 8)


def _check_array(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], axis: int) -> int:
    """Raise where a matrix cannot be made from an array; return `axis` as a number that is not negative."""
    if dtype.hasobject and dtype.kind != "T":
        raise OpenError(f"{name} holds Python objects, which are never unpickled; save plain numbers")
    if not is_numeric(dtype):
        raise InputError(
            f"{name} has dtype {dtype}; convert it to booleans, integers, floats of up to 64 bits or complex numbers"
        )
    if not shape:
        raise InputError(f"{name} is a single number without axes; name another")
    if not all(n > 0 for n in shape):
        raise InputError(f"{name} has shape {shape}, and no values; name another")
    if math.prod(shape) * dtype.itemsize >= 2**63:
        raise InputError(f"{name} has shape {shape}, 2**63 bytes or more; make it smaller")
    if not -len(shape) <= axis < len(shape):
        raise InputError(
            f"axis {show(axis)} is outside [{-len(shape)}, {len(shape) - 1}], the axes of {name} of shape {shape}; "
            "change --axis"
        )
    return axis % len(shape)


def _check_size(source: FileSource) -> None:
    path, size, end = source.stamp.path, source.stamp.size, source.offset + source.nbytes
    if size < end:
        raise OpenError(f"{path} has {size} of the {end} bytes that its header declares; copy it again")
    if source.alone and size > end:
        with path.open("rb") as file:
            file.seek(end)
            what = (
                "a second array" if file.read(len(signatures.NPY_MAGIC)) == signatures.NPY_MAGIC else "something else"
            )
        raise OpenError(
            f"{path} has {size} bytes, {size - end} more than its header declares: after its array comes {what}; "
            "save each array in a separate file"
        )


def split_name(text: str) -> tuple[Path, str | None]:
    """Split ``FILE::NAME``, unless a file of the full name is there.

    Examples
    --------
    >>> split_name("A.h5::/group/data")
    (PosixPath('A.h5'), '/group/data')
    """
    path, colons, name = text.rpartition("::")
    return (Path(path), name) if colons and path and name and not Path(text).exists() else (Path(text), None)


def _name(source: Any) -> str:
    return (
        os.fspath(source)
        if isinstance(source, str | os.PathLike)
        else name_store(getattr(source, "store_path", source))
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
