"""Sizes, the memory budget and its sources, and the measured peak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.memory import Budget, PeakMemory, _cgroup_room, _least_budget, budget, parse_size

MIB = 2**20
UNLIMITED_V1 = 9223372036854771712
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8 * 10**9),
        ("8gb", 8 * 10**9),
        ("1.5 GiB", 1610612736),
        ("500MB", 5 * 10**8),
        ("500M", 5 * 10**8),
        ("3KiB", 3072),
        ("3Ki", 3072),
        ("2TB", 2 * 10**12),
        ("1PiB", 2**50),
        (" 17 ", 17),
        ("17B", 17),
        ("1e3MB", 10**9),
        (4097, 4097),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


def test_sizes_as_dask_reads_them():
    from dask.utils import byte_sizes, parse_bytes

    for unit in byte_sizes:
        assert parse_size(f"3.5{unit or 'kB'}") == parse_bytes(f"3.5{unit or 'kB'}")


BAD_SIZES = [
    "",
    " ",
    "-1GB",
    "8XB",
    "0",
    "0.4B",
    "nan",
    "inf",
    "GB",
    "8 G B",
    "1_000",
    "0x10",
    "٣GB",
    "8i",
    0,
    -5,
    True,
]


@pytest.mark.parametrize("text", BAD_SIZES)
def test_refused_sizes(text):
    with pytest.raises(InputError, match="such as 8GB or 500MiB") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


def test_import_is_light():
    code = "import sys, pipeline.memory; print(sorted({'dask', 'numpy', 'zarr', 'distributed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


class FakeSystem:
    """A /proc and cgroup hierarchies in a folder, with numbers chosen by the test."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.proc = folder / "proc"
        self.write("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:  9000000 kB\n")
        self.write("proc/self/cgroup", "")
        self.mounts = ""
        self.process(os.getpid(), anon=0)

    def write(self, path, text):
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def process(self, pid, anon, children=""):
        self.write(f"proc/{pid}/status", f"Name:\tx\nVmSize:\t 999 kB\nRssAnon:\t {anon} kB\nRssShmem:\t 7 kB\n")
        self.write(f"proc/{pid}/task/{pid}/children", children)

    def mount(self, name, fstype, options, root="/"):
        where = str(self.folder / name).replace(" ", "\\040")
        self.mounts += f"35 31 0:32 {root} {where} rw,relatime shared:1 - {fstype} x {options}\n"
        self.write("proc/self/mountinfo", "22 1 0:5 / / rw - ext4 /dev/vda rw\n" + self.mounts)

    def v2(self, group, limit, used, high="max", **stat):
        self.write(f"v 2{group}/memory.max", f"{limit}\n")
        self.write(f"v 2{group}/memory.high", f"{high}\n")
        self.write(f"v 2{group}/memory.current", f"{used}\n")
        self.write(f"v 2{group}/memory.stat", "".join(f"{key} {value}\n" for key, value in stat.items()))

    def v1(self, group, limit, used, **stat):
        self.write(f"v1{group}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"v1{group}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"v1{group}/memory.stat", "".join(f"{key} {value}\n" for key, value in stat.items()))


@pytest.fixture
def system(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.memory._shared", {})  # Other tests' arrays may live still.
    return FakeSystem(tmp_path)


def test_v2_least_over_ancestors(system):
    system.mount("v 2", "cgroup2", "rw")
    system.write("proc/self/cgroup", "0::/a/b\n")
    system.v2("/a/b", "max", 100)
    system.v2("/a", 5000, 1300, active_file=200, inactive_file=100, anon=900)
    assert list(_cgroup_room(system.proc)) == [("cgroup /a", 4000)]
    assert _least_budget(None, system.proc) == Budget(4000, "cgroup /a")
    system.v2("/a/b", 4500, 700, high=3500)
    assert _least_budget(None, system.proc) == Budget(2800, "cgroup /a/b")


def test_v1_least_over_ancestors(system):
    system.mount("v1cpu", "cgroup", "rw,cpu")
    system.mount("v1", "cgroup", "rw,memory")
    system.mount("v 2", "cgroup2", "rw")
    system.v2("/", 1, 1)
    (system.folder / "v 2/memory.max").unlink()
    (system.folder / "v 2/memory.high").unlink()
    system.write("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/a/b/c\n1:cpu:/x\n0::/\n")
    system.v1("/a/b/c", UNLIMITED_V1, 50)
    system.v1("/a/b", 7000, 1000, active_file=1, total_active_file=30, total_inactive_file=20)
    system.v1("/a", 6500, 900)
    system.v1("", UNLIMITED_V1, 5000)
    assert _least_budget(None, system.proc) == Budget(5600, "cgroup /a")
    system.v1("/a/b", 5500, 1000, total_active_file=30, total_inactive_file=20)
    assert _least_budget(None, system.proc) == Budget(4550, "cgroup /a/b")


def test_container_sees_its_own_subtree_alone(system):
    system.mount("v1", "cgroup", "rw,memory", root="/docker/abc")
    system.write("proc/self/cgroup", "4:memory:/docker/abc/inner\n")
    system.v1("/inner", 9000, 300, hierarchical_memory_limit=8000)
    system.v1("", 8500, 400, hierarchical_memory_limit=8000)
    assert _least_budget(None, system.proc) == Budget(7600, "cgroup /")
    system.write("proc/self/cgroup", "4:memory:/elsewhere\n")
    assert list(_cgroup_room(system.proc)) == [("cgroup /", 7600)]


def test_what_the_tree_holds_already_counts_as_its_own(system):
    system.write("proc/meminfo", "MemAvailable:  100 kB\n")
    system.process(os.getpid(), anon=20, children="11 12 ")
    system.process(11, anon=3, children="13 ")
    system.process(12, anon=5)
    system.process(13, anon=9)
    assert _least_budget(None, system.proc) == Budget((100 + 20 + 3 + 5 + 9) * 1024, "available RAM")
    assert _least_budget(5000, system.proc) == Budget(5000, "--memory")
    system.mount("v 2", "cgroup2", "rw")
    system.write("proc/self/cgroup", "0::/a\n")
    system.v2("/a", 1000, 3000)
    assert _least_budget(None, system.proc) == Budget(37 * 1024, "cgroup /a")


def test_without_proc(tmp_path):
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert _least_budget(None, tmp_path) == Budget(ram, "RAM")


def test_explicit_limit_is_one_of_the_limits():
    assert budget(12345) == Budget(12345, "--memory")
    assert budget(2**60).nbytes < 2**60


@LINUX
def test_address_space_limit():
    code = """
import resource
from pipeline.memory import budget
limit = 1 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = budget()
print(found.source, limit - (200 << 20) < found.nbytes < limit)
room = found.nbytes - int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
bytearray(room - (16 << 20))
try:
    bytearray(room + (16 << 20))
except MemoryError:
    print("refused")
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "RLIMIT_AS True\nrefused\n"


def _cgroup_parent():
    """Folder in which a child cgroup with a memory limit can be made, None without the right to."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            folder, limit = Path("/sys/fs/cgroup/memory" + path), "memory.limit_in_bytes"
        elif number == "0" and "memory" in _read("/sys/fs/cgroup" + path + "/cgroup.subtree_control").split():
            folder, limit = Path("/sys/fs/cgroup" + path), "memory.max"
        else:
            continue
        if os.access(folder, os.W_OK):
            return folder, limit
    return None


def _read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""


@LINUX
def test_real_cgroup():
    if (found := _cgroup_parent()) is None:
        pytest.skip("no right to make a cgroup here")
    parent, limit = found
    outer = parent / f"pipeline-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        inner.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no right to make a cgroup here: {error}")
    try:
        (outer / limit).write_text(str(300 * MIB))
        code = (
            f"open({str(inner / 'cgroup.procs')!r}, 'w').write('0')\n"
            "from pipeline.memory import budget\n"
            "found = budget()\n"
            "print(found.nbytes, found.source)"
        )
        run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        nbytes, source = run.stdout.split(" ", 1)
        assert 250 * MIB < int(nbytes) <= 310 * MIB
        assert f"/{outer.name}" in source
    finally:
        inner.rmdir()
        outer.rmdir()


@LINUX
def test_peak_counts_children_and_what_was_given_back():
    code = "block = bytearray(b'x') * (80 << 20); print('full', flush=True); input()"
    with PeakMemory() as peak:
        before = peak.nbytes
        block = bytearray(b"y") * (60 * MIB)
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout.readline() == "full\n"
            while peak.nbytes < before + 140 * MIB:  # ended by the sampling thread, else by the suite's timeout
                os.sched_yield()
            child.communicate("\n")
        del block
    assert before + 140 * MIB <= peak.nbytes < before + 250 * MIB
    with peak:
        pass
    assert peak.nbytes < before + 60 * MIB
