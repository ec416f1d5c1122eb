"""Files that an HDF5 data set takes its values from, beside its own: links, virtual data sets, external storage.

libhdf5 reads what it cannot find as the fill value, and what an external file lacks as zeros, without a word. So all
that a data set refers to is looked up here, in the order in which libhdf5 does (`H5F_prefix_open_file`), and its size
compared with what is taken from it. What no mapping of a virtual data set speaks of is the fill value by right.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import itertools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import IntegrityError, NotFoundError, OpenError
from pipeline.storage.files import FileStamp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_ENDLESS = 2**64 - 1
"""HDF5's sign for a selection that goes on as far as there are values."""

_MOST_NUMBERED = 1_000_000
"""Numbered sources that are looked through for one that cannot be opened."""

_PREFIXES = ("HDF5_EXT_PREFIX", "HDF5_EXTFILE_PREFIX", "HDF5_VDS_PREFIX")
"""Variables by which the user tells libhdf5 where files lie."""

_MOST_HOPS = 40
"""Links, one behind the other, after which they are taken for a circle."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A file, beside its own, that a data set takes values from."""

    stamp: FileStamp
    is_hdf5: bool
    """False: plain bytes, of external storage."""
    first: tuple[int, ...]
    """Corner of a box of the data set that holds all these values."""
    stop: tuple[int, ...]
    """The corner opposite, exclusive."""


def open_hdf5(path: str | Path, locking: bool | str | None = None) -> Any:
    """Open for reading; by default with libhdf5's own choice of locks: `HDF5_USE_FILE_LOCKING`, else best effort.

    One process may open a file twice only with the same kind of lock, so a caller's open `h5py.File` decides. Where
    the file system has no locks, none is taken: a lock would only keep writers away, and a file that changes while it
    is read is noticed anyway.

    Raises
    ------
    OpenError
        If h5py is not installed, or the file cannot be opened.
    """
    try:
        import h5py
    except ImportError as error:
        raise OpenError(f"HDF5 files need h5py; it is not installed, and {path} is one; pip install h5py") from error
    try:
        return h5py.File(path, "r", locking=locking)
    except OSError as error:
        others = [False, True] if "flag values don't match" in str(error) else [False] if _lacks_locks(error) else []
        for other in others if locking is None else []:
            with contextlib.suppress(OSError):
                return h5py.File(path, "r", locking=other)
        raise _refused(path, error) from error


def _lacks_locks(error: OSError) -> bool:
    """Whether a lock was refused although nobody else holds one."""
    return "unable to lock file" in str(error) and error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)


def _refused(path: str | Path, error: OSError) -> OpenError:
    if _lacks_locks(error):
        return OpenError(
            f"{path} cannot be locked ({os.strerror(error.errno or 0)}): its file system has no locks; set "
            "HDF5_USE_FILE_LOCKING=FALSE in the environment"
        )
    if "unable to lock file" in str(error):
        return OpenError(
            f"{path} is locked by another process, which may be writing to it; wait until it is closed there, or set "
            "HDF5_USE_FILE_LOCKING=FALSE in the environment if it does not change any more"
        )
    return OpenError(f"an HDF5 file must be readable; {path}: {error}; check the file")


def _locking(file: Any) -> bool | str:
    """Kind of lock of an open file: libhdf5 opens the files that it refers to with the same."""
    locks, ignores_absence = file.id.get_access_plist().get_file_locking()
    return ("best-effort" if ignores_absence else True) if locks else False


@contextlib.contextmanager
def hold(file: Any, name: str, references: tuple[Reference, ...], axis: int, start: int, stop: int) -> Iterator[None]:
    """Keep the files open that rows [start, stop) along an axis of a data set come from, while they are read.

    libhdf5 may pass over a file that it cannot open, for a lock or because too many are open; but not over one that
    this process has open already.

    Raises
    ------
    OpenError
        If one of the files cannot be opened.
    IntegrityError
        If one is no longer what it was, or this process would find another in its place.
    """
    if references:
        _check_found(str(Path(file.filename).absolute()), name, references, str(Path.cwd()))
    with contextlib.ExitStack() as stack:
        for reference in references:
            if reference.first[axis] < stop and start < reference.stop[axis]:
                reference.stamp.check()
                if reference.is_hdf5:
                    stack.enter_context(open_hdf5(reference.stamp.path, _locking(file)))
        yield


@functools.lru_cache(maxsize=256)
def _check_found(path: str, name: str, references: tuple[Reference, ...], folder: str) -> None:
    """Refuse to read where names lead to other files: in another working directory or environment. Once a process."""
    with open_hdf5(path) as file:
        found = {reference.stamp.path for reference in find_references(file, name)}
    differing = sorted(found ^ {reference.stamp.path for reference in references})
    if differing:
        raise IntegrityError(
            f"{path}::{name} was opened with other files than it finds here, in the folder {folder}; one of them is "
            f"{differing[0]}; run all workers in one folder, with the same HDF5_* variables"
        )


def find_references(file: Any, name: str, *, outside_files: bool = True) -> tuple[Reference, ...]:
    """Find all files, beside an open one, that what lies at a path takes values from; in the order of their paths.

    Parameters
    ----------
    outside_files
        Whether they may lie outside the folder of the open file, and of folders that the user's own variables
        `HDF5_*_PREFIX` name. A file from somebody else may name any that the user can read.

    Raises
    ------
    NotFoundError
        Naming the file, or the data set of another file, that is missing.
    IntegrityError
        Naming the file that is too short, or the data set that is too small, or made of itself.
    OpenError
        Naming the file that cannot be opened, or lies outside.
    """
    with contextlib.ExitStack() as stack:
        return _Search(file, stack, None if outside_files else _find_folders(file.filename)).run(name)


def _find_folders(path: str) -> list[Path]:
    """Folders whose files a file may take values from: its own, as named and where links lead, and the user's."""
    prefixes = (os.environ.get(name, "").split(":") for name in _PREFIXES)
    named = [Path(each) for each in itertools.chain(*prefixes) if each]
    return [folder.resolve() for folder in (Path(path).absolute().parent, Path(path).resolve().parent, *named)]


def find_filters(file: Any, name: str) -> tuple[tuple[int, str], ...]:
    """Find (identifier, name) of the filters that values pass: of a data set, and of all that it takes values from."""
    with contextlib.ExitStack() as stack:
        search = _Search(file, stack)
        search.run(name)
        return tuple(sorted(search.filters))


def list_stored(file: Any, name: str, where: tuple[slice, ...]) -> Iterator[tuple[Any, tuple[slice, ...]]]:
    """List the chunked data sets, open, that a part of a data set is read from, each with the part of it, or more."""
    import h5py

    with contextlib.ExitStack() as stack:
        search = _Search(file, stack)
        found = search.follow(file["/"], name, [])
        if isinstance(found, h5py.Dataset) and found.shape is not None:
            yield from search.list_stored(found, where)


class _Box(NamedTuple):
    first: tuple[int, ...]
    stop: tuple[int, ...]


class _Source(NamedTuple):
    """One data set that a virtual one takes values from."""

    file: str
    name: str
    box: _Box
    """Of the virtual data set, that it fills."""
    selection: Any
    """What is taken of it: h5py's SpaceID."""
    taken: int
    """Values that are taken of it; along its endless axis alone where the selection has one."""


class _Search:
    """Looks for the files of one data set, and keeps those open that it finds."""

    def __init__(self, file: Any, stack: contextlib.ExitStack, folders: Sequence[Path] | None = None) -> None:
        self.file = file
        self.stack = stack
        self.folders = folders
        """That files may lie in; None: anywhere."""
        self.opened: dict[Path, Any] = {}
        self.references: dict[Path, Reference] = {}
        self.filters: set[tuple[int, str]] = set()

    def run(self, name: str) -> tuple[Reference, ...]:
        import h5py

        passed: list[Path] = []
        found = self.follow(self.file["/"], name, passed)
        if isinstance(found, h5py.Dataset):
            shape = self.find_shape(found)
            if shape is not None:
                box = _Box((0,) * len(shape), shape)
                self.add(passed, box)
                self.explore(found, box, ())
        elif passed:
            raise _lacks(passed[-1], name.rpartition("/")[2], f"{self.file.filename}::{name}")
        return tuple(self.references[path] for path in sorted(self.references))

    def add(self, paths: Sequence[Path], box: _Box, *, is_hdf5: bool = True) -> None:
        """Note that files fill a box of the data set, whatever else of it they fill."""
        for path in paths:
            if path == Path(self.file.filename).absolute():
                continue
            old = self.references.get(path)
            first, stop = box if old is None else (map(min, old.first, box.first), map(max, old.stop, box.stop))
            stamp = FileStamp.take(path) if old is None else old.stamp
            self.references[path] = Reference(stamp, is_hdf5, tuple(first), tuple(stop))

    def follow(self, node: Any, path: str, passed: list[Path], hops: int = 0) -> Any:
        """Return what lies at a path from a group, None if nothing does; `passed` takes the files of external links."""
        import h5py

        if hops > _MOST_HOPS:
            raise IntegrityError(f"links of {node.file.filename} lead in a circle at {path}; repair the file")
        if path.startswith("/"):
            node = node.file["/"]
        for part in (part for part in path.split("/") if part not in ("", ".")):
            link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
            if isinstance(link, h5py.ExternalLink):
                whose = f"the external link {part!r} of {node.file.filename}"
                file = self.open_file(node.file, link.filename, "HDF5_EXT_PREFIX", "", whose)
                passed.append(Path(file.filename))
                node = self.follow(file["/"], link.path, passed, hops + 1)
                if node is None:
                    raise _lacks(passed[-1], link.path, whose)
            elif isinstance(link, h5py.SoftLink):
                node = self.follow(node, link.path, passed, hops + 1)
            else:
                node = None if link is None else node[part]
        return node

    def explore(self, dataset: Any, box: _Box, trail: tuple[tuple[str, str], ...]) -> None:
        """Check all that a data set takes values from; it fills a box of the outermost one, the first of the trail."""
        here = (dataset.file.filename, dataset.name)
        whose = f"the {'virtual ' * dataset.is_virtual}data set {dataset.name} of {dataset.file.filename}"
        if here in trail:
            raise IntegrityError(f"{whose} is made of itself; name another")
        properties = dataset.id.get_create_plist()
        for code, _, _, text in map(properties.get_filter, range(properties.get_nfilters())):
            # Names end in a reference: "bitshuffle; see https://...".
            self.filters.add((code, text.decode(errors="replace").partition(";")[0].strip()))
        self.explore_external(dataset, box, whose)
        for mapping in dataset.virtual_sources() if dataset.is_virtual else ():
            for source in _split(mapping, dataset.shape):
                taken, passed = self.open_source(dataset, source.file, source.name)
                _check_source(taken, source, passed[-1], self.find_shape(taken), whose)
                part = box if trail else source.box
                self.add(passed, part)
                self.explore(taken, part, (*trail, here))
            self.check_ends(dataset, mapping, whose)

    def open_source(self, dataset: Any, file_name: str, name: str) -> tuple[Any, list[Path]]:
        """Open a source of a virtual data set, and list the files that lead to it."""
        import h5py

        whose = f"the virtual data set {dataset.name} of {dataset.file.filename}"
        file = self.open_named(dataset, file_name)
        passed = [Path(file.filename).absolute()]
        source = self.follow(file["/"], name, passed)
        if not isinstance(source, h5py.Dataset):
            raise _lacks(passed[-1], name, whose)
        return source, passed

    def find_shape(self, dataset: Any) -> tuple[int, ...] | None:
        """Return the shape, which of a virtual data set without an end libhdf5 takes from its sources."""
        try:
            shape: tuple[int, ...] | None = dataset.shape
        except (OSError, RuntimeError):
            # libhdf5 does not say which it cannot open.
            for mapping in dataset.virtual_sources():
                for number in range(_MOST_NUMBERED):
                    names = [_numbered(text, str(number)) for text in (mapping.file_name, mapping.dset_name)]
                    try:
                        file = self.open_named(dataset, names[0])
                    except NotFoundError:
                        if number == 0:
                            raise
                        break
                    if number and self.follow(file["/"], names[1], []) is None:
                        break
                    self.find_shape(self.open_source(dataset, *names)[0])
                    if names == [mapping.file_name, mapping.dset_name]:
                        break
            raise
        return shape

    def list_stored(self, dataset: Any, where: tuple[slice, ...]) -> Iterator[tuple[Any, tuple[slice, ...]]]:
        """List the chunked data sets that a part of another is read from; see the function."""
        if not dataset.is_virtual:
            if dataset.chunks is not None and all(part.start < part.stop for part in where):
                yield dataset, where
            return
        for mapping in dataset.virtual_sources():
            for source in _split(mapping, dataset.shape):
                box = list(zip(*source.box, strict=True))
                if all(part.start < stop and first < part.stop for part, (first, stop) in zip(where, box, strict=True)):
                    taken, _ = self.open_source(dataset, source.file, source.name)
                    yield from self.list_stored(taken, _narrow(source, self.find_shape(taken) or (), where))

    def explore_external(self, dataset: Any, box: _Box, whose: str) -> None:
        """Check the files that hold nothing but values of a data set."""
        properties = dataset.id.get_create_plist()
        prefix = os.fsdecode(dataset.id.get_access_plist().get_efile_prefix())
        left = math.prod(dataset.shape) * dataset.id.get_type().get_size()
        for number in range(properties.get_external_count()):
            name, offset, size = properties.get_external(number)
            path = Path(prefix, os.fsdecode(name)).absolute()
            taken = min(left, size)
            left -= taken
            if not taken:
                continue
            self.check_inside(path, whose)
            if not path.is_file():
                raise NotFoundError(f"{path} is missing: it holds values of {whose}; restore it")
            held = path.stat().st_size
            if held < offset + taken:
                raise IntegrityError(
                    f"{path} has {held} of {offset + taken} bytes: it holds values of {whose}, and HDF5 would read "
                    "zeros in their place; restore it"
                )
            self.add([path], box, is_hdf5=False)

    def check_inside(self, path: Path, whose: str) -> None:
        """Refuse a file outside of the folders, wherever links lead."""
        target = path.resolve()
        if self.folders is not None and not any(target.is_relative_to(folder) for folder in self.folders):
            leads = "" if target == path else f", which leads to {target}"
            raise OpenError(
                f"{whose} takes values from {path}{leads}, outside the folder of {self.file.filename}; if you trust "
                f"that file, make a matrix with: pipeline create --outside-files (outside_files=True)"
            )

    def check_ends(self, dataset: Any, mapping: Any, whose: str) -> None:
        """Refuse numbered sources that end where one is missing, although there are some behind it."""
        space, shape = mapping.vspace, dataset.shape
        axis = _endless_axis(space)
        if axis is None or _endless_axis(mapping.src_space) is not None:
            return
        blocks = _count_blocks(space, axis, shape)
        behind: list[str] = []
        if "%b" in mapping.file_name:
            prefix = _virtual_prefix(dataset)
            for pattern in _candidates(dataset.file.filename, mapping.file_name, "HDF5_VDS_PREFIX", prefix):
                behind += _find_numbered(pattern, glob.glob(_numbered(pattern, "*", glob.escape)), blocks)  # noqa: PTH207
        elif "%b" in mapping.dset_name:
            file = self.open_named(dataset, _numbered(mapping.file_name))
            folder, _, pattern = mapping.dset_name.rpartition("/")
            behind += _find_numbered(pattern, self.follow(file["/"], folder, []) or (), blocks)
        if behind:
            file_name, name = (_numbered(text, str(blocks)) for text in (mapping.file_name, mapping.dset_name))
            raise NotFoundError(
                f"{file_name}::{name} is missing, though {behind[0]} exists: {whose} ends there; restore it"
            )

    def open_named(self, dataset: Any, name: str) -> Any:
        """Open the file that a virtual data set names."""
        if name == ".":
            return dataset.file
        whose = f"the virtual data set {dataset.name} of {dataset.file.filename}"
        return self.open_file(dataset.file, name, "HDF5_VDS_PREFIX", _virtual_prefix(dataset), whose)

    def open_file(self, primary: Any, name: str, variable: str, prefix: str, whose: str) -> Any:
        """Open the file that libhdf5 would; one that it would pass over, since it cannot be opened, is an error."""
        for candidate in _candidates(primary.filename, name, variable, prefix):
            path = Path(candidate).absolute()
            if path in self.opened:
                return self.opened[path]
            if path.is_file():
                self.check_inside(path, whose)
                try:
                    file = self.stack.enter_context(open_hdf5(path, _locking(primary)))
                except OpenError as error:
                    raise OpenError(f"{whose} takes values from a file that cannot be opened: {error}") from error
                self.opened[path] = file
                return file
        raise NotFoundError(
            f"{name} is missing: {whose} takes values from it; restore it, where it was or beside the file"
        )


def _candidates(primary: str, name: str, variable: str, prefix: str) -> Iterator[str]:
    """Paths at which libhdf5 looks for a file that another one names, in this order."""
    if os.path.isabs(name):  # noqa: PTH117
        yield name
        name = os.path.basename(name)  # noqa: PTH119
    folders = os.environ.get(variable, "").split(":")
    own = Path(primary).absolute()
    for folder in (*filter(None, folders), *filter(None, [prefix]), str(own.parent), "", str(own.resolve().parent)):
        yield os.path.join(folder, name)  # noqa: PTH118


def _virtual_prefix(dataset: Any) -> str:
    return os.fsdecode(dataset.id.get_access_plist().get_virtual_prefix())


def _lacks(path: Path, name: str, whose: str) -> NotFoundError:
    return NotFoundError(f"{path} has no data set {name}: {whose} takes values from it; restore the file")


def _endless_axis(space: Any) -> int | None:
    """Axis along which a selection goes on as far as there are values."""
    import h5py

    if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        return None
    _, _, count, block = space.get_regular_hyperslab()
    endless = (axis for axis, sizes in enumerate(zip(count, block, strict=True)) if _ENDLESS in sizes)
    return next(endless, None)


def _count_blocks(space: Any, axis: int, shape: Sequence[int]) -> int:
    """Numbered sources that fill the data set; HDF5 ends it where one is missing, and the first must be there."""
    start, stride, _, _ = space.get_regular_hyperslab()
    return max(1, -(-(shape[axis] - int(start[axis])) // int(stride[axis])))


def _count_along(space: Any, axis: int, size: int) -> int:
    """Values that an endless selection takes along its axis."""
    start, stride, _, block = (int(sizes[axis]) for sizes in space.get_regular_hyperslab())
    blocks, rest = divmod(max(0, size - start), stride)
    return max(0, size - start) if block == _ENDLESS else blocks * block + min(rest, block)


def _split(mapping: Any, shape: tuple[int, ...]) -> Iterator[_Source]:
    """List the sources of one mapping of a virtual data set: one, or numbered ones."""
    import h5py

    space, selection = mapping.vspace, mapping.src_space
    axis = _endless_axis(space)
    if space.get_select_type() == h5py.h5s.SEL_NONE:
        return
    file, name = _numbered(mapping.file_name), _numbered(mapping.dset_name)
    if axis is None:
        first, last = space.get_select_bounds()
        yield _Source(file, name, _Box(first, tuple(n + 1 for n in last)), selection, space.get_select_npoints())
        return
    start, stride, count, block = map(list, space.get_regular_hyperslab())
    sizes = [(c - 1) * s + b for c, s, b in zip(count, stride, block, strict=True)]
    if _endless_axis(selection) is not None:
        sizes[axis] = max(0, shape[axis] - start[axis])
        stop = tuple(map(sum, zip(start, sizes, strict=True)))
        yield _Source(file, name, _Box(tuple(start), stop), selection, _count_along(space, axis, shape[axis]))
        return
    sizes[axis], count[axis] = block[axis], 1
    for number in range(_count_blocks(space, axis, shape)):
        first = [*start[:axis], start[axis] + number * stride[axis], *start[axis + 1 :]]
        box = _Box(tuple(first), tuple(map(sum, zip(first, sizes, strict=True))))
        file, name = (_numbered(text, str(number)) for text in (mapping.file_name, mapping.dset_name))
        yield _Source(file, name, box, selection, math.prod(count) * math.prod(block))


def _narrow(source: _Source, shape: tuple[int, ...], where: tuple[slice, ...]) -> tuple[slice, ...]:
    """Part of a source that holds what is read of it: of its whole selection, unless that is one block without gaps."""
    import h5py

    selection = source.selection
    kind, axis = selection.get_select_type(), _endless_axis(selection)
    if kind == h5py.h5s.SEL_ALL or (axis is not None and len(shape) != len(where)):
        begins, ends = [0] * len(shape), list(shape)
    elif axis is not None:
        begins = [int(start) for start in selection.get_regular_hyperslab()[0]]
        ends = list(shape)
    else:
        first, last = selection.get_select_bounds()
        begins, ends = [int(n) for n in first], [int(n) + 1 for n in last]
    sizes = [stop - first for first, stop in zip(*source.box, strict=True)]
    if [end - begin for begin, end in zip(begins, ends, strict=True)] == sizes and math.prod(sizes) == source.taken:
        # The block lies in the virtual data set as it does here.
        moves = [begin - first for begin, first in zip(begins, source.box.first, strict=True)]
        begins = [max(begin, part.start + move) for begin, part, move in zip(begins, where, moves, strict=True)]
        ends = [min(end, part.stop + move) for end, part, move in zip(ends, where, moves, strict=True)]
    return tuple(slice(begin, min(end, size)) for begin, end, size in zip(begins, ends, shape, strict=True))


def _check_source(dataset: Any, source: _Source, path: Path, shape: tuple[int, ...] | None, whose: str) -> None:
    """Refuse a source that has less than what is taken of it: HDF5 would read something else."""
    import h5py

    selection, shape = source.selection, shape or ()
    axis, kind = _endless_axis(selection), selection.get_select_type()
    if kind == h5py.h5s.SEL_ALL:
        fits = math.prod(shape) == source.taken
    elif axis is None:
        last = selection.get_select_bounds()[1]
        fits = len(last) == len(shape) and all(n < size for n, size in zip(last, shape, strict=True))
    else:
        start, stride, count, block = selection.get_regular_hyperslab()
        ends = [b + (c - 1) * s + n for b, s, c, n in zip(start, stride, count, block, strict=True)]
        fits = len(ends) == len(shape) and _count_along(selection, axis, shape[axis]) >= source.taken
        fits = fits and all(end <= size for i, (end, size) in enumerate(zip(ends, shape, strict=True)) if i != axis)
    if not fits:
        raise IntegrityError(
            f"{path}::{dataset.name} has shape {shape}, other than what {whose} takes from it; restore the file"
        )


def _numbered(pattern: str, number: str = "%b", escape: Callable[[str], str] = str) -> str:
    """Put a number into a name of numbered sources, in which `%%` stands for `%`.

    Examples
    --------
    >>> _numbered("100%%-%b.h5", "7")
    '100%-7.h5'
    """
    parts = re.split("(%%|%b)", pattern)
    return "".join(number if part == "%b" else escape("%" if part == "%%" else part) for part in parts)


def _find_numbered(pattern: str, names: Sequence[str], least: int) -> list[str]:
    """Choose the names that are made of a pattern with a number of at least `least`."""
    matched = ((re.fullmatch(_numbered(pattern, "([0-9]+)", re.escape), name), name) for name in names)
    return sorted(name for match, name in matched if match and len({*match.groups()}) == 1 and int(match[1]) >= least)
