"""Chunked HDF5 data sets of every filter and form give what h5py gives."""

import ctypes
import itertools
import os
import subprocess
import sys
import threading
import zlib
from dataclasses import dataclass

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import pipeline
from pipeline.errors import IntegrityError, OpenError, PipelineError
from pipeline.matrix import hdf5
from pipeline.matrix import hdf5_filters as module
from pipeline.matrix.formats import open_source

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
"""Of the comparison with h5py; more by hand."""

ARRAY = np.arange(250 * 7, dtype="f8").reshape(250, 7)

LIBRARY = ctypes.CDLL(h5py.h5p.__file__)
LIBRARY.H5Pset_chunk_opts.argtypes = [ctypes.c_int64, ctypes.c_uint]
LIBRARY.H5Pset_fill_value.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]

PLUGINS = {
    **{
        f"blosc-{name}-{shuffle}": hdf5plugin.Blosc(name, 5, shuffle)
        for name in ("blosclz", "lz4", "zlib", "zstd")
        for shuffle in (0, 1, 2)
    },
    "snappy": hdf5plugin.Blosc("snappy"),
    "zstd": hdf5plugin.Zstd(),
    "lz4": hdf5plugin.LZ4(),
    "bitshuffle": hdf5plugin.Bitshuffle(cname="none"),
    "bitshuffle-lz4": hdf5plugin.Bitshuffle(),
    "blosc2": hdf5plugin.Blosc2(),
    "bzip2": hdf5plugin.BZip2(),
}
BUILT_IN = {
    "gzip": lambda properties: properties.set_deflate(4),
    "shuffle": lambda properties: properties.set_shuffle(),
    "fletcher32": lambda properties: properties.set_fletcher32(),
    "lzf": lambda properties: properties.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL),
    "nbit": lambda properties: properties.set_filter(h5py.h5z.FILTER_NBIT, h5py.h5z.FLAG_OPTIONAL),
    "scaleoffset": lambda properties: properties.set_scaleoffset(h5py.h5z.SO_INT, 0),
    "scaleoffset-float": lambda properties: properties.set_scaleoffset(h5py.h5z.SO_FLOAT_DSCALE, 2),
}
if h5py.h5z.filter_avail(h5py.h5z.FILTER_SZIP):
    BUILT_IN["szip"] = lambda properties: properties.set_szip(h5py.h5z.SZIP_NN_OPTION_MASK, 8)


def chunked(chunks, filters=(), *, partial_unfiltered=False, fill=None, fill_time=None, alloc_time=None, dtype=None):
    """A creation property list."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(chunks)
    for name in filters:
        if name in PLUGINS:
            plugin = PLUGINS[name]
            properties.set_filter(plugin.filter_id, h5py.h5z.FLAG_OPTIONAL, plugin.filter_options)
        else:
            BUILT_IN[name](properties)
    if partial_unfiltered:
        assert LIBRARY.H5Pset_chunk_opts(properties.id, 2) >= 0
    if fill == "undefined":
        assert LIBRARY.H5Pset_fill_value(properties.id, h5py.h5t.NATIVE_DOUBLE.id, None) >= 0
    elif fill is not None:
        properties.set_fill_value(np.array(fill, dtype))
    if fill_time is not None:
        properties.set_fill_time(fill_time)
    if alloc_time is not None:
        properties.set_alloc_time(alloc_time)
    return properties


def create(file, name, shape, kind, properties, *, grows=False):
    space = h5py.h5s.create_simple(shape, (h5py.h5s.UNLIMITED,) * len(shape) if grows else shape)
    h5py.h5d.create(file.id, name.encode(), kind, space, properties)
    return file[name]


def expect(source, expected, *ranges):
    for start, stop in ranges:
        got = source.read_rows(start, stop)
        assert got.dtype == expected.dtype.newbyteorder("=")
        assert got.tobytes() == expected[start:stop].astype(got.dtype).tobytes()


# whatever a file holds


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    axis: int
    dtype: str
    precision: int | None
    filters: tuple[str, ...]
    partial_unfiltered: bool
    libver: str
    grows: bool
    fill: str | float | None
    fill_time: int
    alloc_time: int
    written: tuple[slice, ...]
    masks: tuple[int, ...]
    """Filters that the first chunks skip, as bits."""
    resized: tuple[int, ...] | None
    rows: tuple[float, float]
    seed: int


# All but bzip2 and LZ4, whose plug-ins now and then end the process.
FUZZED = [name for name in PLUGINS if name not in {"bzip2", "lz4"}]
FIRST = [
    (),
    *((name,) for name in ("nbit", "scaleoffset", "scaleoffset-float", *({"szip"} & {*BUILT_IN}), *FUZZED)),
    *(("shuffle", name) for name in FUZZED),
]
"""Filters that take values, or divide by the size of one: behind any other they write outside of their memory."""


@st.composite
def pipelines(draw):
    """Filters in any order that does not crash the writer."""
    first = draw(st.sampled_from(FIRST))
    after = ["gzip", "fletcher32"] if {*first} & {*PLUGINS} else ["gzip", "fletcher32", "shuffle", "lzf", "zstd"]
    later = draw(st.lists(st.sampled_from(after), max_size=3))
    # A plug-in that is there twice has the parameters of one alone.
    return (*first, *(name for i, name in enumerate(later) if name != "zstd" or "zstd" not in later[:i]))


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    grows = draw(st.booleans())
    chunks = tuple(draw(st.integers(1, size + 5 if grows else size)) for size in shape)
    dtype = draw(st.sampled_from(["<f8", ">f8", "<f4", ">f2", "<i8", ">i4", "<u2", "|u1", "|i1", "|b1", "<c8", ">c16"]))
    precision = draw(st.none() | st.integers(9, 15)) if dtype in {"<u2", ">i4"} else None
    corners = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    written = tuple(draw(st.sampled_from([slice(None), slice(a, b)])) for a, b in corners)
    return Case(
        shape,
        chunks,
        draw(st.integers(0, len(shape) - 1)),
        dtype,
        precision,
        draw(pipelines()),
        # Where a data set may grow, libhdf5 writes outside of its memory behind some filters.
        draw(st.booleans()) and not grows,
        draw(st.sampled_from(["earliest", "v110", "latest"])),
        grows,
        draw(st.sampled_from([None, 1, 3, "undefined"])),
        draw(st.sampled_from([h5py.h5d.FILL_TIME_IFSET, h5py.h5d.FILL_TIME_ALLOC, h5py.h5d.FILL_TIME_NEVER])),
        draw(st.sampled_from([h5py.h5d.ALLOC_TIME_DEFAULT, h5py.h5d.ALLOC_TIME_EARLY, h5py.h5d.ALLOC_TIME_LATE])),
        written,
        tuple(draw(st.lists(st.integers(0, 7), max_size=4))),
        draw(st.none() | st.tuples(*(st.integers(1, size + 9) for size in shape))) if grows else None,
        draw(st.tuples(st.floats(0, 1), st.floats(0, 1))),
        draw(st.integers(0, 99)),
    )


def write_case(path, case):
    dtype = np.dtype(case.dtype)
    kind = h5py.h5t.py_create(dtype)
    if case.precision:
        kind = kind.copy()
        kind.set_precision(case.precision)
    rng = np.random.default_rng(case.seed)
    shared = {"dtype": dtype, "fill_time": case.fill_time}

    def values(shape):
        drawn = rng.integers(0, 2 if dtype.kind == "b" else 100, shape)
        return drawn.astype(dtype) * dtype.type(1 + 1j) if dtype.kind == "c" else drawn.astype(dtype)

    with h5py.File(path, "w", libver=case.libver) as file:
        properties = chunked(
            case.chunks,
            case.filters,
            partial_unfiltered=case.partial_unfiltered,
            fill=case.fill,
            alloc_time=case.alloc_time,
            **shared,
        )
        made = create(file, "test", case.shape, kind, properties, grows=case.grows)
        if all(len(range(size)[part]) for size, part in zip(case.shape, case.written, strict=True)):
            made[case.written] = values(made[case.written].shape)
        corners = itertools.product(*(range(0, n, c) for n, c in zip(case.shape, case.chunks, strict=True)))
        for number, (corner, mask) in enumerate(zip(corners, case.masks, strict=False)):
            # One chunk of these filters but some, as libhdf5 itself encodes it.
            kept = [name for i, name in enumerate(case.filters) if not mask >> i & 1]
            part = create(file, f"part{number}", case.chunks, kind, chunked(case.chunks, kept, **shared))
            part[...] = values(case.chunks)
            part.flush()
            skipped, raw = part.id.read_direct_chunk((0,) * len(case.chunks))
            whole = all(c + n <= size for c, n, size in zip(corner, case.chunks, case.shape, strict=True))
            if not whole and case.partial_unfiltered:
                continue
            full = mask & (1 << len(case.filters)) - 1
            for i, position in enumerate(i for i in range(len(case.filters)) if not mask >> i & 1):
                full |= (skipped >> i & 1) << position
            made.id.write_direct_chunk(corner, raw, full)
        if case.resized is not None:
            made.resize(case.resized)


@pytest.mark.parametrize("stored", [b"", b"123", b"1234"])
def test_no_more_than_a_checksum(tmp_path, stored):
    with h5py.File(tmp_path / "A.h5", "w") as file:
        made = create(file, "test", (1,), h5py.h5t.IEEE_F64LE, chunked((1,), ("fletcher32", "gzip")))
        made[:] = 1
        made.id.write_direct_chunk((0,), zlib.compress(stored))
    with pytest.raises(IntegrityError, match="its checksum"):
        open_source(tmp_path / "A.h5", dataset="test").read_rows(0, 1)


def writes(path, case):
    """Whether a file of a case can be written, which a process of its own does."""
    child = os.fork()
    if not child:
        try:
            write_case(path, case)
        except BaseException:  # noqa: BLE001
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("compressor", ["gzip", "lzf", "zstd"])
@pytest.mark.parametrize("adds", [("scaleoffset-float",), ("scaleoffset-float", "fletcher32"), ("fletcher32",) * 3])
def test_small_chunks_that_filters_make_larger(tmp_path, adds, compressor):
    """Headers and checksums are no excess, however few bytes a chunk has."""
    values = np.array([2.5, 3.25, -1.0])
    with h5py.File(tmp_path / "A.h5", "w") as file:
        create(file, "test", (3,), h5py.h5t.IEEE_F64LE, chunked((1,), (*adds, compressor)))[:] = values
    expect(open_source(tmp_path / "A.h5", dataset="test"), values, (0, 3), (1, 2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a child that has no threads, and needs none
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(case=cases())
def test_every_form_gives_what_h5py_gives(tmp_path, case):
    path = tmp_path / "A.h5"
    # Some filters refuse some values, or one another, or end the process that writes.
    if not writes(path, case):
        reject()
    with h5py.File(path) as file:
        stored = file["test"].id.get_storage_size()
        try:
            expected = np.moveaxis(file["test"][()], case.axis, 0)
        except OSError:
            expected = None
    if expected is None:
        with pytest.raises(PipelineError):
            open_source(path, dataset="test", axis=case.axis).read_rows(0, (case.resized or case.shape)[case.axis])
        return
    if case.fill == "undefined" and stored == 0:
        # h5py gives zeros where the time to fill is never: values that nobody has written or asked for.
        with pytest.raises(OpenError, match="never written"):
            open_source(path, dataset="test", axis=case.axis)
        return
    source = open_source(path, dataset="test", axis=case.axis)
    start, stop = sorted(round(share * len(expected)) for share in case.rows)
    expect(source, expected, (0, len(expected)), (start, stop))


# chunks at the edge


@pytest.mark.parametrize(
    "names", [("shuffle",), ("gzip",), ("gzip", "fletcher32"), ("blosc-lz4-1",), ("zstd",), ("lzf",)]
)
@pytest.mark.parametrize("shape", [(250, 7), (200, 7), (300, 11)])
@pytest.mark.parametrize("axis", [0, 1])
def test_edges_without_filters(tmp_path, names, shape, axis):
    array = np.arange(np.prod(shape), dtype="f8").reshape(shape)
    with h5py.File(tmp_path / "A.h5", "w", libver="latest") as file:
        properties = chunked((100, 7), names, partial_unfiltered=True)
        create(file, "test", shape, h5py.h5t.IEEE_F64LE, properties)[...] = array
    rows = shape[axis]
    expect(open_source(tmp_path / "A.h5", axis=axis), np.moveaxis(array, axis, 0), (0, rows), (rows - 2, rows), (1, 3))


def test_edges_that_nobody_can_ask_about(tmp_path, monkeypatch):
    # As on Windows, where a module of h5py does not give the functions of libhdf5.
    with h5py.File(tmp_path / "A.h5", "w", libver="latest") as file:
        for name, raw in (("raw", True), ("filtered", False)):
            properties = chunked((100, 7), ("shuffle",), partial_unfiltered=raw)
            create(file, name, (250, 7), h5py.h5t.IEEE_F64LE, properties)[...] = ARRAY
    monkeypatch.setattr(module.ctypes, "CDLL", lambda path: object())
    for name in ("raw", "filtered"):
        source = open_source(tmp_path / "A.h5", dataset=name)
        assert not source.data.edges_filtered
        expect(source, ARRAY, (0, 250), (240, 250))


def test_whole_chunks_are_decoded_outside_of_the_lock(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "A.h5", "w", libver="latest") as file:
        properties = chunked((100, 7), ("shuffle", "gzip"), partial_unfiltered=True)
        create(file, "test", (250, 7), h5py.h5t.IEEE_F64LE, properties)[...] = ARRAY
    source = open_source(tmp_path / "A.h5")
    decoded = []
    read = hdf5.Hdf5Source._read_chunk
    monkeypatch.setattr(hdf5.Hdf5Source, "_read_chunk", lambda *given: decoded.append(given[2]) or read(*given))
    expect(source, ARRAY, (0, 250))
    assert decoded == [(0, 0), (100, 0)]


# chunks that were never written


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize(
    ("layout", "filters", "grows"),
    [
        *(
            ("chunked", each, grows)
            for each in ((), ("gzip",), ("shuffle", "zstd"), ("lzf",), ("lz4",))
            for grows in (False, True)
        ),
        ("contiguous", (), False),
        ("compact", (), False),
    ],
)
@pytest.mark.parametrize("dtype", ["<f8", ">i4"])
def test_never_written(tmp_path, libver, layout, filters, grows, dtype):
    properties = chunked((100, 7), filters, fill=2.0, dtype=dtype)
    if layout != "chunked":
        properties.set_layout(getattr(h5py.h5d, layout.upper()))
    with h5py.File(tmp_path / "A.h5", "w", libver=libver) as file:
        create(file, "test", (250, 7), h5py.h5t.py_create(np.dtype(dtype)), properties, grows=grows)
    for axis in (0, 1):
        source = open_source(tmp_path / "A.h5", axis=axis)
        rows = source.shape[0]
        expect(source, np.full((250, 7)[:: -1 if axis else 1], 2, dtype), (0, rows), (rows - 1, rows), (1, 1))


def test_never_written_becomes_a_matrix(tmp_path, cli):
    with h5py.File(tmp_path / "A.h5", "w") as file:
        file.create_dataset("test", (250, 7), "f8", chunks=(100, 7), compression="gzip", fillvalue=2.5)
    assert cli("create", "A.h5", "A.zarr").code == 0
    assert (np.asarray(pipeline.open_matrix(tmp_path / "A.zarr").array[:]) == 2.5).all()


def test_partly_written_in_an_index_of_every_kind(tmp_path):
    kinds = itertools.product(["earliest", "latest"], [(250, 7), (None, 7), (None, None)], [(), ("gzip",)])
    expected = np.full((250, 7), 2.5)
    expected[130:140] = ARRAY[130:140]
    for libver, maxshape, filters in kinds:
        with h5py.File(tmp_path / "A.h5", "w", libver=libver) as file:
            options = {"compression": filters[0]} if filters else {}
            made = file.create_dataset(
                "test", (250, 7), "f8", chunks=(50, 7), maxshape=maxshape, fillvalue=2.5, **options
            )
            made[130:140] = ARRAY[130:140]
        expect(open_source(tmp_path / "A.h5"), expected, (0, 250), (120, 160))


@pytest.mark.parametrize("layout", ["chunked", "contiguous"])
def test_neither_values_nor_a_fill_value(tmp_path, layout):
    properties = chunked((100, 7), fill="undefined")
    if layout == "contiguous":
        properties.set_layout(h5py.h5d.CONTIGUOUS)
    with h5py.File(tmp_path / "A.h5", "w") as file:
        create(file, "test", (250, 7), h5py.h5t.IEEE_F64LE, properties)
    with pytest.raises(OpenError, match="was never written, and has no fill value"):
        open_source(tmp_path / "A.h5")


# plug-ins


def write_plugin(path, name, **options):
    with h5py.File(path, "w", **options) as file:
        create(file, "test", (250, 7), h5py.h5t.IEEE_F64LE, chunked((100, 7), (name,)))[...] = ARRAY


def write_virtual(path, source):
    layout = h5py.VirtualLayout((250, 7), "f8")
    layout[:] = h5py.VirtualSource(source, "test", (250, 7))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("test", layout)


def run(script, *arguments):
    """Run a script in a process of its own, which has not imported hdf5plugin."""
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["bitshuffle-lz4", "lz4", "blosc2", "bzip2", "snappy"])
def test_plugins(tmp_path, name):
    write_plugin(tmp_path / "A.h5", name)
    source = open_source(tmp_path / "A.h5")
    assert source.data.filters is None
    expect(source, ARRAY, (0, 250), (90, 110))


@pytest.mark.parametrize("kind", ["bitshuffle-lz4", "virtual"])
def test_plugins_from_the_shell(tmp_path, kind):
    for name in ("bitshuffle-lz4", "lz4", "blosc2"):
        write_plugin(tmp_path / f"{name}.h5", name)
    write_virtual(tmp_path / "virtual.h5", "blosc2.h5")
    files = [
        tmp_path / f"{name}.h5" for name in (["virtual"] if kind == "virtual" else ["bitshuffle-lz4", "lz4", "blosc2"])
    ]
    done = run("from pipeline.cli.main import main; main()", "create", *files, tmp_path / "A.zarr")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(
        pipeline.open_matrix(tmp_path / "A.zarr").array[:], np.concatenate([ARRAY] * len(files))
    )


def test_plugins_on_workers(tmp_path):
    write_plugin(tmp_path / "A.h5", "bitshuffle-lz4")
    with pipeline.connect(workers=2):
        matrix = pipeline.create_matrix(tmp_path / "A.h5", tmp_path / "A.zarr", shard_rows=50, chunk_rows=10)
    np.testing.assert_array_equal(matrix.array[:], ARRAY)


def test_absent_plugin_from_the_shell(tmp_path):
    write_plugin(tmp_path / "A.h5", "bitshuffle-lz4")
    script = "import sys; sys.modules['hdf5plugin'] = None; from pipeline.cli.main import main; main()"
    done = run(script, "create", tmp_path / "A.h5", tmp_path / "A.zarr")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "'bitshuffle' (32008) is not available" in done.stderr
    assert f"{tmp_path}/A.h5::/test" in done.stderr
    assert "pip install hdf5plugin" in done.stderr
    assert not (tmp_path / "A.zarr").exists()


WITHOUT_PLUGIN = """
import sys; sys.modules["hdf5plugin"] = None
import numpy
from pipeline.errors import PipelineError
from pipeline.matrix.formats import open_source
for name in sys.argv[1:]:
    try:
        numpy.save(name.split("::")[0] + ".npy", open_source(name).read_rows(0, 250))
        print("read")
    except PipelineError as error:
        print(type(error).__name__, error)
"""


def test_absent_plugins(tmp_path):
    cases = {}
    for name, plugin in PLUGINS.items():
        write_plugin(tmp_path / f"{name}.h5", name)
        known = name == "zstd" or name.startswith("blosc-")
        cases[f"{name}.h5"] = ARRAY if known else f"({plugin.filter_id}) is not available"
    # Behind one and two virtual data sets.
    write_virtual(tmp_path / "V.h5", "lz4.h5")
    write_virtual(tmp_path / "W.h5", "V.h5")
    cases["V.h5"] = cases["W.h5"] = "(32004) is not available"
    # No chunk needs the filter.
    with h5py.File(tmp_path / "never.h5", "w") as file:
        create(file, "test", (250, 7), h5py.h5t.IEEE_F64LE, chunked((100, 7), ("lz4",), fill=2.5, dtype="f8"))
    cases["never.h5"] = np.full((250, 7), 2.5)
    for name, last in (("skipped", 1), ("mostly", 0)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            made = create(file, "test", (250, 7), h5py.h5t.IEEE_F64LE, chunked((50, 7), ("lz4",)))
            for first in range(0, 250, 50):
                made.id.write_direct_chunk((first, 0), ARRAY[first : first + 50].tobytes(), 1 if first < 200 else last)
    cases["skipped.h5"] = ARRAY
    cases["mostly.h5"] = "(32004) is not available"

    done = run(WITHOUT_PLUGIN, *(tmp_path / name for name in cases))
    assert done.stderr == ""
    for (name, expected), line in zip(cases.items(), done.stdout.splitlines(), strict=True):
        if isinstance(expected, str):
            assert line.startswith("OpenError ")
            assert expected in line
            assert "pip install hdf5plugin" in line
        else:
            assert line == "read", name
            np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)


def test_filter_that_no_plugin_has(tmp_path):
    with h5py.File(tmp_path / "A.h5", "w") as file:
        properties = chunked((50, 7))
        properties.set_filter(32099, h5py.h5z.FLAG_OPTIONAL, ())
        made = create(file, "test", (250, 7), h5py.h5t.IEEE_F64LE, properties)
        made.id.write_direct_chunk((0, 0), ARRAY[:50].tobytes(), 0)
    with pytest.raises(OpenError, match=r"\(32099\) is not available; .*HDF5_PLUGIN_PATH"):
        open_source(tmp_path / "A.h5")


# under the lock of libhdf5


def test_other_filters_by_many_threads_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "_PIECE_BYTES", 1000)
    with h5py.File(tmp_path / "A.h5", "w") as file:
        file.create_dataset("test", data=ARRAY, chunks=(16, 7), compression="lzf")
    source = open_source(tmp_path / "A.h5")
    right = []
    both = threading.Barrier(2)

    def read(start):
        both.wait()
        right.extend(np.array_equal(source.read_rows(start, stop), ARRAY[start:stop]) for stop in range(start, 251))

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * (251 + 201)


@pytest.mark.parametrize("name", ["bitshuffle-lz4", "blosc2", "zstd", "blosc-zstd-1"])
def test_corrupt_chunk_of_a_plugin(tmp_path, name):
    write_plugin(tmp_path / "A.h5", name)
    with h5py.File(tmp_path / "A.h5") as file:
        where = file["test"].id.get_chunk_info_by_coord((100, 0))
    with (tmp_path / "A.h5").open("r+b") as file:
        file.seek(where.byte_offset)
        file.write(b"\xff" * where.size)
    source = open_source(tmp_path / "A.h5")
    expect(source, ARRAY, (0, 100))
    with pytest.raises(IntegrityError, match="restore the file"):
        source.read_rows(90, 120)
