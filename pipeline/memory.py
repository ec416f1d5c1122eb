"""How many bytes this process and its children may hold, and how many they did."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pipeline.arguments import is_whole, show
from pipeline.errors import BudgetError, InputError
from pipeline.formatting import format_size
from pipeline.process import renewed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sized

_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?) *(?P<unit>(?:[kmgtp]i?)?b?)", re.IGNORECASE)
_EXPONENT = {letter: power for power, letter in enumerate("kmgtp", start=1)}
_OCTAL = re.compile(r"\\([0-7]{3})")
_SAMPLE_SECONDS = 0.05
_LIMIT = "--memory"
_LOAD = "import mmap, numpy, zarr, zarr.storage, distributed; mmap.mmap(-1, 100 << 20)"
_LOADED_NBYTES, _LOADED_THREAD_NBYTES = 512 * 2**20, 64 * 2**20
"""Address space from which on nobody looks whether libraries can be loaded. They take 140 MB, and 40 MB more for each
core but the first, for which OpenBLAS allocates."""


def parse_size(text: str | int) -> int:
    """Bytes that a size names, with the units of Dask: kB is 1000, KiB is 1024, in either case, and no unit is bytes.

    Parameters
    ----------
    text
        Such as `"8GB"`, `"1.5 GiB"`, `"500MB"`, or a number of bytes.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    InputError
        If `text` is not a size, or less than one byte.

    Examples
    --------
    >>> parse_size("8GB"), parse_size("1.5 GiB"), parse_size(4096)
    (8000000000, 1610612736, 4096)
    """
    nbytes = 0
    if is_whole(text):
        nbytes = int(text)
    elif isinstance(text, str) and (match := _SIZE.fullmatch(text.strip())):
        prefix = match["unit"].lower().removesuffix("b")
        base = 1024 if prefix.endswith("i") else 1000
        nbytes = int(Decimal(match["number"]) * base ** _EXPONENT.get(prefix[:1], 0))
    if nbytes < 1:
        raise InputError(f"a size is a positive number of bytes; got {show(text)}; write it such as 8GB or 500MiB")
    return min(nbytes, 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory that this process and its descendants may hold in all."""

    nbytes: int
    """Bytes, those that they hold already among them."""
    source: str
    """The limit that sets it: `--memory`, `cgroup /a/b`, `RLIMIT_AS`, `available RAM` or `RAM`."""

    def __str__(self) -> str:
        # Less than the interpreter takes: whoever wrote 10 meant no ten bytes.
        bare = self.source == _LIMIT and self.nbytes < 10**6
        hint = " (a number without a unit is bytes; write such as 8GB)" if bare else ""
        return f"{self.source} allows {format_size(self.nbytes)}{hint}"


def budget(limit: int | None = None) -> Budget:
    """Memory that this process and its descendants may hold in all: the least of every limit on them.

    A limit shared with others (RAM, a cgroup) counts as what is free below it, the page cache being free, plus the
    memory that this process and its descendants hold already. `RLIMIT_AS` bounds each process alone and
    counts address space: what this process has mapped beside its anonymous memory comes off it.

    Parameters
    ----------
    limit
        Bytes that the user allows, None for no such limit.

    Returns
    -------
    Budget
        On systems without `/proc` only `limit`, `RLIMIT_AS` and the size of RAM are known.

    Examples
    --------
    >>> budget(1_000_000)
    Budget(nbytes=1000000, source='--memory')
    """
    return _least_budget(limit, Path("/proc"))


def check_address_space() -> None:
    """Raise BudgetError where `RLIMIT_AS` (``ulimit -v``) leaves no room for the libraries that all verbs load.

    Under a low limit they are loaded in a child first: their C code ends the process, or interrupts it, where it finds
    no memory.
    """
    try:
        import resource
    except ImportError:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or soft >= _LOADED_NBYTES + (os.cpu_count() or 1) * _LOADED_THREAD_NBYTES:
        return
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([sys.executable, "-P", "-c", _LOAD], capture_output=True, stdin=subprocess.DEVNULL, check=True)  # noqa: S603
        return
    raise BudgetError(
        f"not enough memory: RLIMIT_AS (ulimit -v) allows {format_size(soft)} of address space, loading NumPy and Zarr "
        f"takes more; raise it"
    )


def held_nbytes() -> int:
    """Memory that this process and its descendants hold now: anonymous, and shared with `count_shared`.

    Without `/proc` the former is 0.
    """
    return _held_nbytes(Path("/proc"))


def resident_nbytes() -> int:
    """Memory of this process alone, with the files that it has mapped; 0 without `/proc`."""
    return _status_bytes(Path("/proc"), os.getpid(), "VmRSS")


def _held_nbytes(proc: Path) -> int:
    held = sum(_status_bytes(proc, pid, "RssAnon") for pid in _process_tree(proc, os.getpid()))
    return held + _shared_nbytes()


_shared: dict[int, tuple[list[int], int]] = {}
"""By the id of a map of memory that processes share: its descriptors, none once closed; bytes of the map."""
_sharing = renewed(threading.RLock())


def count_shared(mapped: Sized, fds: list[int]) -> Callable[[], None]:
    """Count memory that others write into, too, once, whoever maps it: the pages that are written, later all of it.

    Parameters
    ----------
    mapped
        It counts until nobody uses this any more.
    fds
        Descriptors of the memory. The function that is returned is called before they are closed.
    """
    key, nbytes = id(mapped), len(mapped)

    def close() -> None:
        with _sharing:
            if key in _shared:
                _shared[key] = ([], nbytes)

    def forget() -> None:
        with _sharing:
            _shared.pop(key, None)

    with _sharing:
        _shared[key] = (fds, nbytes)
    weakref.finalize(mapped, forget).atexit = False
    return close


def _shared_nbytes() -> int:
    with _sharing:
        return sum(
            sum(os.fstat(fd).st_blocks * 512 for fd in fds) if fds else nbytes for fds, nbytes in _shared.values()
        )


def _least_budget(limit: int | None, proc: Path) -> Budget:
    own = _held_nbytes(proc)
    budgets = [] if limit is None else [Budget(limit, _LIMIT)]
    budgets += [Budget(max(0, free) + own, source) for source, free in _cgroup_room(proc)]
    budgets += _address_space(proc)
    if free := _fields(proc / "meminfo").get("MemAvailable"):
        budgets.append(Budget(free + own, "available RAM"))
    else:
        with contextlib.suppress(AttributeError, ValueError, OSError):
            budgets.append(Budget(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "RAM"))
    return min(budgets, key=lambda each: each.nbytes, default=Budget(sys.maxsize, "no known limit"))


def _address_space(proc: Path) -> list[Budget]:
    """`RLIMIT_AS`, if there is one; without its module (Windows) there is none."""
    try:
        import resource
    except ImportError:
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return []
    pid = os.getpid()
    other = _status_bytes(proc, pid, "VmSize") - _status_bytes(proc, pid, "RssAnon")
    return [Budget(max(0, soft - other), "RLIMIT_AS")]


def _cgroup_room(proc: Path) -> Iterator[tuple[str, int]]:
    """Yield the name of each cgroup that bounds this process's memory, and the bytes free below its limit.

    Both hierarchies count where a system runs both; a limit holds for all cgroups below it, so each ancestor that can
    be seen has its say.
    """
    for line in _lines(proc / "self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            kind, limits, usage = "cgroup2", ["memory.max", "memory.high"], "memory.current"
        elif "memory" in controllers.split(","):
            kind, limits, usage = "cgroup", ["memory.limit_in_bytes"], "memory.usage_in_bytes"
        else:
            continue
        if (found := _cgroup_folder(proc, kind, path)) is None:
            continue
        mount, folder = found
        for group in (folder, *folder.parents):
            stat = _fields(group / "memory.stat", unit=1)
            bounds = [int(text) for name in limits for text in _lines(group / name) if text.isdecimal()]
            # Version 1 also tells of ancestors that lie outside a container's view.
            bounds += [stat[key] for key in ("hierarchical_memory_limit",) if key in stat]
            used = sum(int(text) for text in _lines(group / usage) if text.isdecimal())
            prefix = "" if kind == "cgroup2" else "total_"
            reclaimable = sum(stat.get(prefix + key, 0) for key in ("active_file", "inactive_file"))
            if bounds:
                name = "/" + "/".join(group.relative_to(mount).parts)
                yield f"cgroup {name}", min(bounds) - max(0, used - reclaimable)
            if group == mount:
                break


def _cgroup_folder(proc: Path, kind: str, path: str) -> tuple[Path, Path] | None:
    """Mount point of the hierarchy that bounds memory, and the folder of the cgroup `path` in it."""
    for line in _lines(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        fstype, _, options = after.split(" ", 2)
        if fstype != kind or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, mount = (_OCTAL.sub(lambda m: chr(int(m[1], 8)), field) for field in before.split(" ")[3:5])
        # A container's mount shows only the subtree below `root`; a path outside it cannot be seen from here.
        inside = os.path.relpath(path, root)
        folder = Path(mount) if inside.split("/")[0] == ".." else Path(mount, inside)
        return Path(mount), folder if folder.is_dir() else Path(mount)
    return None


def _process_tree(proc: Path, root: int) -> list[int]:
    """`root` and its living descendants, as far as the kernel lists children (CONFIG_PROC_CHILDREN)."""
    pids = [root]
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.scandir(proc / str(pid) / "task"):
                pids += [int(child) for line in _lines(Path(task.path, "children")) for child in line.split()]
    return pids


def _status_bytes(proc: Path, pid: int, *names: str) -> int:
    """Sum of fields of a process's status, in bytes; 0 once the process is gone."""
    fields = _fields(proc / str(pid) / "status")
    return sum(fields.get(name, 0) for name in names)


def _fields(path: Path, unit: int = 1024) -> dict[str, int]:
    """Lines such as `RssAnon:  12 kB` or `anon 12288` of a file, those with a number; empty where there is no file."""
    words = (line.split() for line in _lines(path))
    return {word[0].rstrip(":"): int(word[1]) * unit for word in words if len(word) > 1 and word[1].isdecimal()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:  # Not this system, not this version of cgroups, or a process that ended meanwhile.
        return []


class PeakMemory:
    """Context manager that samples the memory of this process and its descendants, every 50 ms.

    It counts anonymous memory, and shared memory once: that of `count_shared`, or of the process that maps most of it,
    whichever is more. Mapped files are left out. Between two samples a shorter peak is missed. Without `/proc` it
    gives the largest resident size of this process so far.

    Examples
    --------
    >>> with PeakMemory() as peak:
    ...     block = bytearray(1_000_000)
    >>> peak.nbytes > 1_000_000
    True
    """

    nbytes: int
    """Largest number of bytes seen since entering."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self.nbytes = 0
        self._stop.clear()
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        proc = Path("/proc")
        pids = _process_tree(proc, os.getpid())
        held = sum(_status_bytes(proc, pid, "RssAnon") for pid in pids)
        shared = max(_shared_nbytes(), *(_status_bytes(proc, pid, "RssShmem") for pid in pids))
        self.nbytes = max(self.nbytes, held + shared if held else _largest_resident())


def _largest_resident() -> int:
    try:
        import resource
    except ImportError:
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
