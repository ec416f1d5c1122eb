"""Missing values, scaling and names travel: what xarray reads of a result is what it reads of the source."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import xarray
import zarr

import pipeline
from pipeline.errors import IntegrityError
from tests.layouts import STORES, stack

ROWS, COLUMNS, LENGTH = 60, 4, 5
STARTS = [33, 0, 17, 17, 55]
SCALED = {"scale_factor": 0.01, "add_offset": 280.0}
ENCODINGS = {
    "i2-scaled": {"dtype": "i2", "_FillValue": -32768} | SCALED,
    "i2-only-scale": {"dtype": "i2", "_FillValue": -1, "scale_factor": 0.5},
    "u1": {"dtype": "u1", "_FillValue": 255},
    "u1-as-i1": {"dtype": "i1", "_FillValue": -1, "_Unsigned": "true"},
    "i4-missing-value": {"dtype": "i4", "missing_value": -777, "_FillValue": -777},
    "i8": {"dtype": "i8", "_FillValue": -(2**40)},
    "f4": {"dtype": "f4", "_FillValue": -9999.1},
    "f4-scaled": {"dtype": "f4", "scale_factor": 0.5, "add_offset": 1.0},
    "f8": {"dtype": "f8", "_FillValue": -9999.1},
    "f8-missing-value": {"dtype": "f8", "missing_value": 1e20, "_FillValue": 1e20},
    "f8-nan": {"dtype": "f8"},
}
"""As xarray takes them."""
KINDS = ["v2", "v3", "nc"]


def decoded(name):
    """Values as a user of xarray has them, some of them missing."""
    values = np.arange(ROWS * COLUMNS, dtype="f8").reshape(ROWS, COLUMNS)
    if "_Unsigned" not in ENCODINGS[name] and ENCODINGS[name]["dtype"] != "u1":
        values -= 100
    if "add_offset" in ENCODINGS[name]:
        values = values * ENCODINGS[name]["scale_factor"] + ENCODINGS[name]["add_offset"]
    values[[3, 18, 35, 57], [0, 1, 3, 2]] = np.nan
    # With `_FillValue` -1, a value that would be missing by itself.
    values[values == -0.5] = 7
    return values


def write_source(folder, kind, name, **more):
    """Write `A` (time, level) beside its coordinates; return what xarray reads of it, and the path for a matrix."""
    dataset = xarray.Dataset(
        {"A": (("time", "level"), decoded(name), {"units": "K", "note": ["a", "b"]})},
        {"time": ("time", np.arange(ROWS) * 3, {"units": "seconds since 2000-01-01"}), "level": [850, 500, 250, 100]},
    )
    encoding = {"A": ENCODINGS[name] | more}
    if kind == "nc":
        dataset.to_netcdf(folder / "S.nc", engine="h5netcdf", encoding=encoding)
        opened, path = xarray.open_dataset(folder / "S.nc", engine="h5netcdf"), f"{folder / 'S.nc'}::A"
    else:
        dataset.to_zarr(folder / "S.zarr", zarr_format=int(kind[1]), consolidated=False, encoding=encoding)
        opened, path = xarray.open_zarr(folder / "S.zarr", consolidated=False), folder / "S.zarr" / "A"
    with opened:
        return opened["A"].load(), path


def open_result(path):
    with xarray.open_zarr(path, consolidated=False) as result:
        for array in result.variables.values():
            array.attrs.pop("random-windows", None)
        return result.load()


def make_matrix(folder, source, **settings):
    """A matrix that was made of a source, as the array `B.zarr` of a group, which is what xarray opens."""
    zarr.open_group(folder / "G.zarr", mode="a")
    return pipeline.create_matrix(source, folder / "G.zarr" / "B.zarr", **settings)


same = np.testing.assert_array_equal


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_reads_as_its_source(tmp_path, kind, name):
    expected, path = write_source(tmp_path, kind, name)
    assert np.isnan(expected.values).sum() == 4
    matrix = make_matrix(tmp_path, path)
    made = open_result(tmp_path / "G.zarr")["B.zarr"]
    same(made.values, expected.values, strict=True)
    assert made.dims == ("time", "level")
    assert made.attrs == {"units": "K", "note": ["a", "b"]}
    stored = pipeline.store(pipeline.plan_windows(matrix, STARTS, length=LENGTH), tmp_path / "w.zarr")
    windows = open_result(tmp_path / "w.zarr").windows
    same(windows.values, stack(expected.values, STARTS, LENGTH), strict=True)
    assert windows.dims == ("window", "row", "level")
    assert windows.attrs == {"units": "K", "note": ["a", "b"]}
    assert set(stored.array_keys()) == {"windows", "starts"}
    assert pipeline.verify(tmp_path / "w.zarr") == []


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_windows_read_as_their_source(tmp_path, kind, name):
    """Also in place: netCDF-4 without chunks is plain bytes of a file."""
    expected, path = write_source(tmp_path, kind, name)
    matrix = pipeline.open_matrix(path)
    planned = pipeline.plan_windows(matrix, STARTS, length=LENGTH, columns=[2, 0, 3])
    pipeline.store(planned, tmp_path / "w.zarr")
    windows = open_result(tmp_path / "w.zarr").windows
    same(windows.values, stack(expected.values[:, [2, 0, 3]], STARTS, LENGTH), strict=True)
    assert windows.dims == ("window", "row", "level")
    assert windows.attrs == {"units": "K", "note": ["a", "b"]}


CASTS = [
    ("i2-scaled", "f4"),
    ("i2-scaled", "i4"),
    ("i2-scaled", "f8"),
    ("i2-scaled", "i1"),
    ("u1", "i2"),
    ("u1", "f4"),
    ("i4-missing-value", "f8"),
    ("i4-missing-value", "i2"),
    ("i8", "f4"),
    ("f4", "f8"),
    ("f4-scaled", "f8"),
    ("f8", "f4"),
    ("f8-missing-value", "f4"),
    ("f8-nan", "f4"),
]


@pytest.mark.parametrize(("name", "dtype"), CASTS)
@pytest.mark.parametrize("kind", KINDS)
def test_cast_windows_read_as_their_source(tmp_path, kind, name, dtype):
    expected, path = write_source(tmp_path, kind, name)
    # A missing value that the other dtype does not hold is lost, which is an error of its own.
    starts, lost = STARTS, (name, dtype) in {("i2-scaled", "i1"), ("i8", "f4")}
    if lost:
        starts = [23, 24, 25]
    planned = pipeline.plan_windows(pipeline.open_matrix(path), starts, length=LENGTH, dtype=dtype)
    pipeline.store(planned, tmp_path / "w.zarr")
    windows = open_result(tmp_path / "w.zarr").windows
    wanted = stack(expected.values, starts, LENGTH)
    assert lost or np.isnan(wanted).any()
    same(windows.values, wanted.astype(windows.dtype))
    assert windows.dtype.itemsize >= np.dtype(dtype).itemsize
    assert windows.attrs == {"units": "K", "note": ["a", "b"]}
    if lost:
        # No value of the cast equals what int8 does not hold.
        assert ("_FillValue" in zarr.open_array(tmp_path / "w.zarr" / "windows").attrs) == (dtype != "i1")
        lossy = pipeline.plan_windows(pipeline.open_matrix(path), [0], length=LENGTH, dtype=dtype)
        with pytest.raises(IntegrityError, match="does not hold"):
            pipeline.store(lossy, tmp_path / "lossy.zarr")


@pytest.mark.parametrize("dtype", ["i2", "f4"])
def test_where_a_cast_changes_what_scaling_means_all_of_it_goes(tmp_path, dtype):
    """Stored -2 means 254 of 8 bits, and 65,534 of 16."""
    _, path = write_source(tmp_path, "v3", "u1-as-i1")
    planned = pipeline.plan_windows(pipeline.open_matrix(path), [55], length=LENGTH, dtype=dtype)
    windows = pipeline.store(planned, tmp_path / "w.zarr")["windows"]
    assert set(windows.attrs) == {"note", "coordinates"}
    same(open_result(tmp_path / "w.zarr").windows.values, windows[:], strict=True)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_of_any_store(tmp_path, kind, store):
    expected, path = write_source(tmp_path, kind, "i2-scaled")
    array = zarr.open_array(STORES[store](path), mode="r")
    pipeline.store(pipeline.plan_windows(pipeline.open_matrix(array), STARTS, length=LENGTH), tmp_path / "w.zarr")
    same(open_result(tmp_path / "w.zarr").windows.values, stack(expected.values, STARTS, LENGTH), strict=True)
    make_matrix(tmp_path, array)
    same(open_result(tmp_path / "G.zarr")["B.zarr"].values, expected.values, strict=True)


@pytest.mark.s3
@pytest.mark.parametrize("kind", KINDS)
def test_into_a_bucket(bucket, tmp_path, kind):
    expected, path = write_source(tmp_path, kind, "i2-scaled")
    matrix = pipeline.create_matrix(path, f"{bucket.url}/A.zarr")
    result = pipeline.store(pipeline.plan_windows(matrix, STARTS, length=LENGTH), f"{bucket.url}/w.zarr")
    with xarray.open_zarr(result.store, consolidated=False) as opened:
        same(opened.windows.values, stack(expected.values, STARTS, LENGTH), strict=True)


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_chunks_of_missing_values_that_xarray_leaves_out(tmp_path, kind):
    dataset = xarray.Dataset({"A": (("time", "level"), np.full((ROWS, COLUMNS), 3.0))})
    dataset["A"][20:30] = np.nan
    dataset["A"][44] = np.nan
    encoding = {"dtype": "f4", "_FillValue": -9999.0, "chunks": (10, COLUMNS)}
    if kind == "v3":
        encoding["fill_value"] = -9999.0
    dataset.to_zarr(tmp_path / "S.zarr", zarr_format=int(kind[1]), consolidated=False, encoding={"A": encoding})
    matrix = pipeline.open_matrix(tmp_path / "S.zarr" / "A", missing_chunks="fill")
    present, wanted, _ = matrix.count_files()
    assert present < wanted
    pipeline.store(pipeline.plan_windows(matrix, [18, 40], length=LENGTH), tmp_path / "w.zarr")
    with xarray.open_zarr(tmp_path / "S.zarr", consolidated=False) as source:
        expected = stack(source["A"].values, [18, 40], LENGTH)
    same(open_result(tmp_path / "w.zarr").windows.values, expected, strict=True)
    strict = pipeline.open_matrix(tmp_path / "S.zarr" / "A")
    with pytest.raises(IntegrityError, match="absent"):
        pipeline.store(pipeline.plan_windows(strict, [18], length=LENGTH), tmp_path / "v.zarr")


@pytest.mark.parametrize("kind", ["v2", "v3", "nc"])
@pytest.mark.parametrize("cast", [False, True])
def test_of_groups(tmp_path, kind, cast):
    sources = {}
    for name in ("i2-scaled", "f8"):
        (tmp_path / name).mkdir()
        sources[name] = write_source(tmp_path / name, kind, name)
    group = pipeline.open_matrix({name.split("-")[0]: path for name, (_, path) in sources.items()})
    said = repr(group)
    assert "_FillValue -32768" in said
    assert "_FillValue -9999.1" in said
    dtype = {"i2": "f4", "f8": "f4"} if cast else None
    planned = pipeline.plan_windows(group, STARTS, length=LENGTH, dtype=dtype)
    pipeline.store(planned, tmp_path / "w.zarr")
    result = open_result(tmp_path / "w.zarr")
    for name, (expected, _) in sources.items():
        windows = result[name.split("-")[0]]
        same(windows.values, stack(expected.values, STARTS, LENGTH).astype(windows.dtype))
        assert np.isnan(windows.values).any()
        assert windows.attrs["units"] == "K"


def test_a_zarr_group_of_members(tmp_path):
    values = decoded("i2-scaled")
    both = xarray.Dataset({"x": (("time", "a"), values), "y": (("time",), values[:, 0])})
    both.to_zarr(
        tmp_path / "S.zarr",
        zarr_format=2,
        consolidated=False,
        encoding=dict.fromkeys(("x", "y"), ENCODINGS["i2-scaled"]),
    )
    planned = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "S.zarr"), STARTS, length=LENGTH)
    pipeline.store(planned, tmp_path / "w.zarr")
    result = open_result(tmp_path / "w.zarr")
    with xarray.open_zarr(tmp_path / "S.zarr", consolidated=False) as source:
        for name in ("x", "y"):
            same(result[name].values, stack(source[name].values, STARTS, LENGTH), strict=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [("i2-scaled", "_FillValue -32768"), ("f4", "_FillValue -9999.1"), ("f8-missing-value", "_FillValue 1e+20")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_fill_values_are_shown_decoded(cli, tmp_path, kind, name, words):
    _, path = write_source(tmp_path, kind, name)
    matrix = pipeline.open_matrix(path)
    made = make_matrix(tmp_path, path)
    for each in (matrix, made):
        assert words in repr(each)
        assert words in json.loads(cli("info", each.path, "--json").out)["scaling"]
        assert words in cli("info", each.path).out
    assert words in cli("run", path, "--count", 2, "--length", 3, "--out", "w.npy").err


def test_a_bare_array_of_an_older_format_has_no_missing_values(tmp_path):
    """Every array of Zarr v2 has a fill value; without names of dimensions xarray cannot read it, and masks nothing."""
    for name, fill in (("A", 0), ("B", 5)):
        array = zarr.create_array(tmp_path / f"{name}.zarr", shape=(20, 2), dtype="i4", zarr_format=2, fill_value=fill)
        array[:] = 1
        matrix = pipeline.open_matrix(tmp_path / f"{name}.zarr")
        assert matrix.scaling == ""
        storing = pipeline.store(pipeline.plan_windows(matrix, [3], length=2), tmp_path / f"{name}w.zarr")
        assert storing["windows"].attrs.asdict() == {}
        facts = storing.attrs["random-windows"]["request"]
        assert not {"attributes", "coordinates"} & set(facts)
        made = pipeline.create_matrix(tmp_path / f"{name}.zarr", tmp_path / f"{name}m.zarr")
        assert set(made.array.attrs) == {"random-windows"}


@pytest.mark.parametrize("dtype", ["?", "i1", "u8", "f2", "f4", "f8", "c8", "c16"])
@pytest.mark.parametrize("kind", ["v2", "nc"])
def test_fill_values_of_any_dtype_are_written_as_xarray_reads_them(tmp_path, kind, dtype):
    value = np.array(1 if dtype == "?" else 3, dtype)[()]
    data = np.zeros((20, 2), dtype)
    data[4] = value
    if kind == "nc":
        path = f"{tmp_path / 'A.h5'}::A"
        with h5py.File(tmp_path / "A.h5", "w") as file:
            file["A"] = data
            file["A"].attrs["_FillValue"] = np.array([value])
    else:
        path = tmp_path / "A.zarr"
        settings = {"zarr_format": 2, "fill_value": value, "attributes": {"_ARRAY_DIMENSIONS": ["t", "c"]}}
        zarr.create_array(path, data=None, shape=data.shape, dtype=dtype, **settings)[:] = data
    make_matrix(tmp_path, path)
    with xarray.open_zarr(tmp_path / "G.zarr", consolidated=False, mask_and_scale=False) as made:
        decode = made["B.zarr"].attrs["_FillValue"]
        assert decode == value
        assert type(decode) in (bool, int, float, complex)


class TestHdf5:
    def test_what_hdf5_keeps_for_itself_stays_there(self, tmp_path):
        with h5py.File(tmp_path / "A.h5", "w") as file:
            data = file.create_dataset("A", data=np.arange(60.0).reshape(20, 3), chunks=(5, 3))
            for axis, name in enumerate(("time", "level")):
                file[name] = np.arange(data.shape[axis])
                file[name].make_scale(name)
                data.dims[axis].attach_scale(file[name])
            data.attrs["one"] = np.array([2.5], "f4")
            data.attrs["several"] = np.array([[1, 2], [3, 4]], "i2")
            data.attrs["text"] = np.bytes_(b"caf\xc3\xa9")
            data.attrs["words"] = ["a", "b"]
            data.attrs["truth"] = np.True_
            data.attrs["nothing"] = h5py.Empty("f4")
            data.attrs["reference"] = file["time"].ref
            data.attrs["compound"] = np.array((1, 2.0), [("a", "i4"), ("b", "f8")])
            data.attrs["_Netcdf4Dimid"] = 3
            data.attrs["_Netcdf4Coordinates"] = [0, 1]
            data.attrs["_nc3_strict"] = 1
            data.attrs["coordinates"] = "lat lon"
            data.attrs["huge"] = np.uint64(2**64 - 1)
            data.attrs["missing_value"] = np.nan
        array = pipeline.create_matrix(tmp_path / "A.h5::A", tmp_path / "A.zarr").array
        given = {name: value for name, value in array.attrs.asdict().items() if name != "random-windows"}
        assert np.isnan(given.pop("missing_value"))
        assert given == {
            "one": 2.5,
            "several": [[1, 2], [3, 4]],
            "text": "café",
            "words": ["a", "b"],
            "truth": True,
            "huge": 2**64 - 1,
        }
        assert array.metadata.dimension_names == ("time", "level")

    @pytest.mark.parametrize("axis", [0, 1])
    def test_names_follow_the_rows(self, tmp_path, axis):
        _, path = write_source(tmp_path, "nc", "f8")
        made = pipeline.create_matrix(path, tmp_path / "A.zarr", axis=axis)
        assert made.array.metadata.dimension_names == (("time", "level"), ("level", "time"))[axis]

    def test_labels_and_scales_themselves_are_names(self, tmp_path):
        with h5py.File(tmp_path / "A.h5", "w") as file:
            file["A"] = np.arange(60.0).reshape(20, 3)
            file["A"].dims[1].label = "channel"
            file["t"] = np.arange(20.0)
            file["t"].make_scale()
        made = pipeline.create_matrix(tmp_path / "A.h5::A", tmp_path / "A.zarr")
        assert made.array.metadata.dimension_names == ("row", "channel")
        made = pipeline.create_matrix(tmp_path / "A.h5::t", tmp_path / "t.zarr")
        assert made.array.metadata.dimension_names == ("t",)

    def test_a_bare_data_set_is_the_request_that_it_was(self, tmp_path):
        with h5py.File(tmp_path / "A.h5", "w") as file:
            file["A"] = np.arange(60.0).reshape(20, 3)
            file.create_dataset("B", data=np.arange(60.0).reshape(20, 3), chunks=(5, 3))
        for name in "AB":
            made = pipeline.create_matrix(f"{tmp_path / 'A.h5'}::{name}", tmp_path / f"{name}.zarr")
            assert set(made.array.attrs["random-windows"]["request"]) == {"kind", "source", "shape", "dtype", "layout"}
        plan = pipeline.plan_windows(pipeline.open_matrix(f"{tmp_path / 'A.h5'}::A"), [3], length=2)
        stored = pipeline.store(plan, tmp_path / "w.zarr")
        assert "attributes" not in stored.attrs["random-windows"]["request"]

    def test_attributes_that_change_make_another_request(self, tmp_path):
        _, path = write_source(tmp_path, "nc", "i2-scaled")
        pipeline.create_matrix(path, tmp_path / "A.zarr")
        with h5py.File(tmp_path / "S.nc", "a") as file:
            file["A"].attrs["scale_factor"] = 0.02
        with pytest.raises(pipeline.OutputExistsError, match="of another request"):
            pipeline.create_matrix(path, tmp_path / "A.zarr", resume=True)

    def test_scaling_in_single_precision_is_that_of_zarr(self, tmp_path):
        """JSON has one kind of number: xarray multiplies in float64 what it multiplied in float32."""
        scaled = {"scale_factor": np.float32(0.01), "add_offset": np.float32(280)}
        expected, path = write_source(tmp_path, "nc", "i2-scaled", **scaled)
        assert expected.dtype == "f4"
        make_matrix(tmp_path, path)
        made = open_result(tmp_path / "G.zarr")["B.zarr"]
        with xarray.open_dataset(tmp_path / "S.nc", engine="h5netcdf", decode_cf=False) as raw:
            raw.load().to_zarr(tmp_path / "X.zarr", zarr_format=3, consolidated=False)
        same(made.values, open_result(tmp_path / "X.zarr")["A"].values, strict=True)
        np.testing.assert_allclose(made.values, expected.values, rtol=1e-6)


class TestParts:
    """Files stacked into one matrix: what is said of all is said of it."""

    def write(self, folder, kind, name="i2-scaled", **more):
        folder.mkdir()
        return write_source(folder, kind, name, **more)

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_all_parts_have_travels(self, tmp_path, kind):
        sources = [self.write(tmp_path / name, kind) for name in "ab"]
        if kind == "nc":
            with h5py.File(tmp_path / "b" / "S.nc", "a") as file:
                file["A"].attrs["note"] = "another"
        make_matrix(tmp_path, [path for _, path in sources])
        made = open_result(tmp_path / "G.zarr")["B.zarr"]
        same(made.values, np.concatenate([expected.values for expected, _ in sources]), strict=True)
        assert made.dims == ("time", "level")
        assert made.attrs == {"units": "K"} | ({} if kind == "nc" else {"note": ["a", "b"]})
        if kind == "nc":
            matrix = pipeline.open_matrix([path for _, path in sources])
            pipeline.store(pipeline.plan_windows(matrix, [57], length=LENGTH), tmp_path / "w.zarr")
            windows = open_result(tmp_path / "w.zarr").windows
            same(windows.values, stack(made.values, [57], LENGTH), strict=True)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("more", [{"scale_factor": 0.02}, {"_FillValue": -1}])
    def test_parts_whose_numbers_mean_different_values(self, tmp_path, kind, more):
        paths = [self.write(tmp_path / name, kind, **given)[1] for name, given in (("a", {}), ("b", more))]
        with pytest.raises(pipeline.InputError, match=next(iter(more))):
            pipeline.create_matrix(paths, tmp_path / "A.zarr")

    def test_a_fill_value_of_nan_is_no_difference(self, tmp_path):
        expected, path = self.write(tmp_path / "a", "v3", "f8-nan")
        np.save(tmp_path / "b.npy", expected.values)
        made = pipeline.create_matrix([path, tmp_path / "b.npy"], tmp_path / "A.zarr")
        same(made.array[:], np.concatenate([expected.values] * 2))
