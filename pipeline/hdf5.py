"""Rows of HDF5 data sets, decoded on all cores in spite of the one lock of libhdf5.

h5py takes a global lock around everything, decompression included. Three ways around it, by what the file says:

- A contiguous data set is plain bytes at an offset of the file: `describe` reports the offset and h5py is not needed.
- Chunks with well-known filters: only the compressed bytes are fetched under the lock; they are decoded outside of it.
- Anything else (LZF, SZIP, scale-offset, virtual data sets, external links) only h5py can read. Helper processes with a
  lock each do it, and send rows through a pipe. They are plain subprocesses that run this module: unlike
  `multiprocessing` that works in daemonic workers and in scripts without a ``__main__`` guard. A helper is kept for the
  next read, since importing h5py costs as much as decoding tens of megabytes, and ends with the process that started
  it, however that ends: its standard input closes.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import IncompleteError, InputError, IntegrityError, NotFoundError, OpenError, PipelineError
from pipeline.files import FileStamp, check_rows
from pipeline.netcdf import read_labels
from pipeline.references import Reference, find_references, hold, open_hdf5

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pipeline.conventions import Labels

_DEFLATE, _SHUFFLE, _FLETCHER32, _BLOSC, _ZSTD = 1, 2, 3, 32001, 32015
"""Registered identifiers of the filters that are decoded here."""

_HELPER_BYTES = 1 << 20
"""Reads of less than this are not worth a helper process."""

_LISTED = 10
"""Names that an error message lists at most."""


@dataclass(frozen=True, slots=True)
class Hdf5Dataset:
    """What a file says of one data set."""

    stamp: FileStamp
    """The file."""
    references: tuple[Reference, ...]
    """Other files that values come from, such as those of a virtual data set."""
    name: str
    """Path of the data set in the file."""
    shape: tuple[int, ...]
    """As in the file."""
    dtype: np.dtype[Any]
    """As in the file, either byte order."""
    offset: int | None
    """Byte of the file at which a contiguous data set begins; None for every other."""
    chunks: tuple[int, ...] | None
    """Shape of a chunk; None if the data set has no chunks of its own."""
    filters: tuple[tuple[int, int], ...] | None
    """(identifier, first parameter) in the order of writing; None if only h5py can read the data set."""
    nbytes: int
    """Bytes that the data take in the file."""
    labels: Labels = field(compare=False)


@dataclass(frozen=True, slots=True)
class Hdf5Source:
    """Rows of a data set that is chunked, or that only h5py can read."""

    data: Hdf5Dataset
    axis: int
    """Axis of the data set that holds the rows; not negative."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        shape = self.data.shape
        return (shape[self.axis], *shape[: self.axis], *shape[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Native byte order."""
        return self.data.dtype.newbyteorder("=")

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        return min(self.data.chunks[self.axis], self.shape[0]) if self.data.chunks else 1

    @property
    def nbytes(self) -> int:
        """Bytes that the data take in the file."""
        return self.data.nbytes

    @property
    def labels(self) -> Labels:
        """What the file says beside the values; the name of the rows is the first."""
        return self.data.labels.first(self.axis)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop); each chunk is read and decoded once.

        Raises
        ------
        IntegrityError
            If the file changed since it was opened, or a chunk cannot be read or decoded.
        IncompleteError
            If a helper process dies.
        IndexError
            If not ``0 <= start <= stop <= rows``.
        """
        check_rows(start, stop, self.shape[0])
        self.data.stamp.check()
        if self.data.filters is not None:
            return self._decode_rows(start, stop)
        data = self.data
        with open_hdf5(data.stamp.path) as file, hold(file, data.name, data.references, self.axis, start, stop):
            return self._ask_rows(start, stop)

    def _ask_rows(self, start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        request: dict[str, Any] = {
            "path": str(self.data.stamp.path),
            "name": self.data.name,
            "axis": self.axis,
            "start": start,
            "stop": stop,
            "chunk_rows": self.chunk_rows,
        }
        try:
            if out.nbytes < _HELPER_BYTES:
                done = 0
                for piece in _iter_pieces(**request):
                    out[done : done + len(piece)] = piece
                    done += len(piece)
            else:
                _read_in_helper(request, out)
        except PipelineError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise self._broken(f"rows [{start}, {stop})", error) from error
        return out

    def _decode_rows(self, start: int, stop: int) -> NDArray[Any]:
        data, axis = self.data, self.axis
        assert data.chunks is not None
        shape = list(data.shape)
        shape[axis] = stop - start
        out = np.empty(shape, self.dtype)
        grid = [range(0, size, chunk) for size, chunk in zip(data.shape, data.chunks, strict=True)]
        chunk_rows = data.chunks[axis]
        grid[axis] = range(start // chunk_rows * chunk_rows, stop, chunk_rows)
        with open_hdf5(data.stamp.path) as file:
            dataset = file[data.name]
            fill = dataset.fillvalue
            for corner in itertools.product(*grid):
                # In a frame of the data set: where the chunk lies, and the part of it that was asked for.
                stops = [min(c + n, size) for c, n, size in zip(corner, data.chunks, data.shape, strict=True)]
                first, last = max(corner[axis], start), min(stops[axis], stop)
                target = [slice(c, s) for c, s in zip(corner, stops, strict=True)]
                target[axis] = slice(first - start, last - start)
                part = [slice(0, s - c) for c, s in zip(corner, stops, strict=True)]
                part[axis] = slice(first - corner[axis], last - corner[axis])
                try:
                    chunk = self._read_chunk(dataset, corner)
                except (OSError, RuntimeError, ValueError, zlib.error) as error:
                    raise self._broken(f"the chunk at {corner}", error) from error
                out[tuple(target)] = fill if chunk is None else chunk[tuple(part)]
        return np.moveaxis(out, axis, 0)

    def _read_chunk(self, dataset: Any, corner: tuple[int, ...]) -> NDArray[Any] | None:
        """Return a whole decoded chunk, or None for one that was never written."""
        data = self.data
        assert data.filters is not None
        assert data.chunks is not None
        try:
            mask, raw = dataset.id.read_direct_chunk(corner)
        except (OSError, RuntimeError):
            # Asked only now: this look-up walks the whole index of chunks.
            if dataset.id.get_chunk_info_by_coord(corner).byte_offset is None:
                return None
            raise
        size = math.prod(data.chunks) * data.dtype.itemsize
        for position, (identifier, parameter) in reversed(tuple(enumerate(data.filters))):
            if not mask >> position & 1:
                raw = _undo_filter(identifier, parameter, raw, size)
        chunk: NDArray[Any] = np.frombuffer(raw, np.uint8)
        if chunk.nbytes != size:
            raise ValueError(f"it holds {chunk.nbytes} bytes instead of {size}")
        return chunk.view(data.dtype).reshape(data.chunks)

    def _broken(self, what: str, error: Exception) -> IntegrityError:
        text = " ".join(str(error).split())
        return IntegrityError(
            f"every chunk of a source must be readable; {what} of {self.data.stamp.path}::{self.data.name} "
            f"is not ({text}); restore the file"
        )


def describe(path: Path, name: str | None) -> Hdf5Dataset:
    """Read what a file says of one data set; no data are read.

    Parameters
    ----------
    path
        The file.
    name
        Path of the data set in it; None takes the only one.

    Raises
    ------
    NotFoundError
        If the file has no data set of that name.
    OpenError
        If h5py is not installed, or the file cannot be opened.
    InputError
        If `name` is None and the file does not hold exactly one data set of at least one dimension.
    """
    stamp = FileStamp.take(path)
    with open_hdf5(path) as file:
        import h5py

        try:
            if name is None:
                name = _find_only(file)
            references = find_references(file, name)
            dataset = file.get(name)
        except PipelineError:
            raise
        except (KeyError, OSError, RuntimeError) as error:
            raise OpenError(f"a data set must be readable; {path}::{name}: {error}; restore the file") from error
        if not isinstance(dataset, h5py.Dataset):
            raise NotFoundError(
                f"a data set must be in its file; {path} has no {name!r}; {_list_names(_find_datasets(file))}"
            )
        if dataset.shape is None:
            raise OpenError(f"a data set must hold values; {path}::{dataset.name} is empty; name another")
        plain = (
            not references and not dataset.is_virtual and h5py.h5t.py_create(dataset.dtype).equal(dataset.id.get_type())
        )
        properties = dataset.id.get_create_plist()
        offset = dataset.id.get_offset() if plain else None
        filters = [properties.get_filter(i) for i in range(properties.get_nfilters())]
        known = plain and dataset.chunks is not None and _can_decode(filters)
        return Hdf5Dataset(
            stamp=stamp,
            references=references,
            name=name,
            shape=dataset.shape,
            # h5py hangs what it knows of enums, strings and references on the dtype.
            dtype=np.dtype(dataset.dtype.str) if dataset.dtype.kind in "biufc" else dataset.dtype,
            offset=offset,
            chunks=dataset.chunks,
            filters=tuple((f[0], f[2][0] if f[2] else 0) for f in filters) if known else None,
            nbytes=dataset.id.get_storage_size(),
            labels=read_labels(dataset),
        )


def _find_only(file: Any) -> str:
    found = _find_datasets(file)
    if len(found) != 1:
        raise InputError(
            f"a data set must be named in a file that does not hold exactly one; {file.filename}: "
            f"{_list_names(found)}; write {file.filename}::NAME, or use --dataset NAME"
        )
    return f"/{found[0]}"


def _find_datasets(file: Any) -> list[str]:
    import h5py

    found: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim >= 1:
            found.append(name)

    file.visititems(visit)
    return found


def _list_names(names: Sequence[str]) -> str:
    if not names:
        return "it holds none"
    return f"it holds {', '.join(names[:_LISTED])}" + (
        f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    )


def _can_decode(filters: Sequence[tuple[int, int, tuple[int, ...], bytes]]) -> bool:
    identifiers = [f[0] for f in filters]
    # Behind a checksum the bytes are no whole elements any more, which HDF5 shuffles in a way of its own.
    return {*identifiers} <= {_DEFLATE, _SHUFFLE, _FLETCHER32, _BLOSC, _ZSTD} and _SHUFFLE not in identifiers[1:]


def _undo_filter(identifier: int, parameter: int, raw: Any, size: int) -> Any:
    """Undo one filter outside of h5py's lock, and outside of Python's."""
    import numcodecs
    from numcodecs.fletcher32 import Fletcher32

    if identifier == _DEFLATE:
        # `size` is a guess that saves growing the result.
        return zlib.decompress(raw, bufsize=size + 4)
    if identifier == _SHUFFLE:
        # Not numcodecs' own, which holds Python's lock: copies in NumPy do not, and are faster.
        planes = np.frombuffer(raw, np.uint8).reshape(parameter, -1)
        elements = np.empty(planes.shape[::-1], np.uint8)
        for position, plane in enumerate(planes):
            elements[:, position] = plane
        return elements.reshape(-1)
    codecs = {_FLETCHER32: Fletcher32(), _BLOSC: numcodecs.Blosc(), _ZSTD: numcodecs.Zstd()}
    return codecs[identifier].decode(raw)


def _iter_pieces(*, path: str, name: str, axis: int, start: int, stop: int, chunk_rows: int) -> Iterator[NDArray[Any]]:
    """Yield rows [start, stop) through h5py, rows first, cut where chunks end so that none is decoded twice."""
    with open_hdf5(Path(path)) as file:
        dataset = file[name]
        row_bytes = max(1, dataset.dtype.itemsize * dataset.size // dataset.shape[axis])
        step = chunk_rows * max(1, (4 << 20) // (row_bytes * chunk_rows))
        cuts = [start, *range(start // step * step + step, stop, step), stop]
        for first, last in itertools.pairwise(cuts):
            block = np.moveaxis(dataset[(slice(None),) * axis + (slice(first, last),)], axis, 0)
            yield block.astype(block.dtype.newbyteorder("="), copy=False)


_helpers: deque[subprocess.Popen[bytes]] = deque()
"""Helpers that wait for work; as many as ever read at the same time."""

if hasattr(os, "register_at_fork"):
    # A forked child must not write into its parent's pipes.
    os.register_at_fork(after_in_child=_helpers.clear)


@atexit.register
def _stop_helpers() -> None:
    while _helpers:
        _stop(_helpers.pop())


def _stop(helper: subprocess.Popen[bytes]) -> None:
    helper.kill()
    helper.wait()
    for pipe in (helper.stdin, helper.stdout):
        # Closing flushes, to nobody.
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()


def _start_helper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeline.hdf5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # The most that Linux gives without privileges.
        pipesize=1 << 20,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # Ctrl-C is the parent's business.
        start_new_session=True,
    )


def _take_helper() -> subprocess.Popen[bytes]:
    while _helpers:
        helper = _helpers.pop()
        if helper.poll() is None:
            return helper
        _stop(helper)
    return _start_helper()


def _read_in_helper(request: dict[str, Any], out: NDArray[Any]) -> None:
    helper = _take_helper()
    assert helper.stdin is not None
    assert isinstance(helper.stdout, io.BufferedReader)
    try:
        helper.stdin.write(json.dumps(request).encode() + b"\n")
        helper.stdin.flush()
        left = memoryview(out.reshape(-1).view(np.uint8))
        while left:
            # Each piece follows a line with its size; a line that is no number says what went wrong.
            line = helper.stdout.readline().decode().strip()
            if line and not line.isdigit():
                raise OSError(line)  # noqa: TRY301
            size = int(line or len(left))
            if helper.stdout.readinto(left[:size]) != size:
                raise BrokenPipeError  # noqa: TRY301
            left = left[size:]
    except BaseException as error:
        # What is still in the pipe must not be taken for the next answer.
        _stop(helper)
        if isinstance(error, BrokenPipeError):
            raise IncompleteError(
                f"a process that reads {request['path']} must live until it is done; it died with exit code "
                f"{helper.returncode}, perhaps for lack of memory; start again"
            ) from error
        raise
    _helpers.append(helper)


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Run a helper: a request a line, answered by pieces of rows, until the input closes."""
    for line in requests:
        try:
            for piece in _iter_pieces(**json.loads(line)):
                answers.write(b"%d\n" % piece.nbytes)
                answers.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        except BrokenPipeError:
            return
        except Exception as error:  # noqa: BLE001 -- whatever it is, the other end raises it
            answers.write(f"{type(error).__name__}: {error}".replace("\n", " ").encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
