"""Coordinates with absent chunks: the fill value where writers leave such chunks out, never where they were lost."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import xarray
import zarr

import pipeline
from pipeline.errors import IntegrityError
from pipeline.storage.buckets import open_bucket
from pipeline.storage.locations import locate
from tests.layouts import distinct, stack

ROWS = 20
STARTS = [12, 0, 3]

CHUNKS = {
    "chunks": {"chunks": (2,)},
    "shards": {"chunks": (2,), "shards": (4,)},
    "inner chunks": {"chunks": (2,), "shards": (200,)},
    "v2": {"chunks": (2,), "zarr_format": 2},
}


def write(path, name="time", values=(), *, dtype="i8", fill=0, form="chunks", columns=3):
    """An array `A` (time, level), and one of its coordinates, of which zarr leaves out chunks of the fill value."""
    format_ = CHUNKS[form].get("zarr_format", 3)
    group = zarr.create_group(path, zarr_format=format_)
    for each, data in (("A", distinct(ROWS, (columns,))), (name, np.asarray(values, dtype))):
        dims = ["time", "level"] if each == "A" else [name]
        named = {"dimension_names": dims} if format_ == 3 else {"attributes": {"_ARRAY_DIMENSIONS": dims}}
        settings = (CHUNKS[form] | {"fill_value": fill}) if each == name else {"zarr_format": format_}
        settings = {key: value for key, value in settings.items() if key != "zarr_format"}
        group.create_array(each, shape=data.shape, dtype=data.dtype, **settings, **named)[:] = data
    return path / "A"


def count_keys(path):
    return sum(each.is_file() and each.name[0] != "." and each.suffix != ".json" for each in path.rglob("*"))


def stored(source, folder, **options):
    planned = pipeline.plan_windows(pipeline.open_matrix(source, **options), STARTS, length=2)
    with pipeline.Report() as report:
        result = pipeline.store(planned, folder / "w.zarr")
    return result, report


@pytest.mark.parametrize("version", [2, 3])
def test_a_level_of_zero_that_xarray_left_out(cli, tmp_path, version):
    data = distinct(ROWS, (1,))
    dataset = xarray.Dataset({"A": (("time", "level"), data)}, {"level": [0.0], "time": np.arange(ROWS)})
    # Of integers, version 2 has no fill value, and xarray leaves nothing out.
    encoding = {"level": {"_FillValue": 0.0} if version == 2 else {"fill_value": 0.0, "_FillValue": None}}
    dataset.to_zarr(tmp_path / "S.zarr", zarr_format=version, consolidated=False, encoding=encoding)
    assert count_keys(tmp_path / "S.zarr" / "level") == 0
    line = ["run", tmp_path / "S.zarr" / "A", "--count", 3, "--length", 2]
    said = cli(*line, "--out", "w.zarr")
    assert said.code == 0, said.err
    assert "absent chunks of level" in said.out + said.err
    assert zarr.open_array(tmp_path / "w.zarr" / "level")[:].tolist() == [0]
    assert cli(*line, "--out", "v.zarr", "--json").numbers["filled_coordinates"] == ["level"]
    assert cli(*line, "--out", "v.zarr", "--json", "--resume").numbers["filled_coordinates"] == ["level"]
    with (
        xarray.open_zarr(tmp_path / "S.zarr", consolidated=False) as source,
        xarray.open_zarr(tmp_path / "w.zarr", consolidated=False) as result,
    ):
        np.testing.assert_array_equal(result.level.values, source.level.values, strict=True)


@pytest.mark.parametrize("form", CHUNKS)
@pytest.mark.parametrize(
    ("values", "dtype", "fill"),
    [
        ([0], "i8", 0),
        ([-2, -1, 5, 7], "i8", 5),
        ([9, 8, 0, -1, -4], "i2", 0),
        ([250, 100], "u1", 100),
        ([0.5, 1.5, 2.5], "f4", 2.5),
        ([np.nan], "f8", np.nan),
        ([False, True], "?", False),
    ],
    ids=str,
)
def test_what_is_in_order_so_filled(tmp_path, form, values, dtype, fill, monkeypatch):
    monkeypatch.setitem(CHUNKS, form, CHUNKS[form] | {"chunks": (1,)})
    source = write(tmp_path / "S.zarr", "level", values, dtype=dtype, fill=fill, form=form, columns=len(values))
    expected = np.asarray(values, dtype)
    result, report = stored(source, tmp_path)
    np.testing.assert_array_equal(result["level"][:], expected, strict=True)
    assert report.runs[0].filled == ["level"]
    assert report.numbers()["runs"][0]["filled_coordinates"] == ["level"]
    assert "absent chunks of level" in repr(report)
    assert pipeline.verify(tmp_path / "w.zarr") == []
    # Columns are chosen of what is in order as a whole.
    again = pipeline.plan_windows(pipeline.open_matrix(source), STARTS, length=2, columns=[-1, -1])
    chosen = pipeline.store(again, tmp_path / "c.zarr")["level"][:]
    np.testing.assert_array_equal(chosen, expected[[-1, -1]], strict=True)


@pytest.mark.parametrize("form", CHUNKS)
@pytest.mark.parametrize("step", [1, -1])
def test_a_time_of_rows_that_begins_or_ends_at_the_fill_value(tmp_path, form, step, monkeypatch):
    monkeypatch.setitem(CHUNKS, form, CHUNKS[form] | {"chunks": (1,)})
    time = np.arange(ROWS)[::step]
    source = write(tmp_path / "S.zarr", "time", time, form=form)
    result, report = stored(source, tmp_path)
    np.testing.assert_array_equal(result["time"][:], stack(time, STARTS, 2), strict=True)
    assert report.runs[0].filled == ["time"]


LOST = [
    (np.arange(1, ROWS + 1) * 3600, "i8", 0),
    (np.arange(1, ROWS + 1) * 3600, "i8", 3600 * 4),
    (np.arange(ROWS)[::-1] + 1.0, "f8", 0.0),
    (np.arange(ROWS) + 1.0, "f4", np.nan),
    (np.arange(1, ROWS + 1), "u2", 2**16 - 1),
]


@pytest.mark.parametrize("form", CHUNKS)
@pytest.mark.parametrize(("values", "dtype", "fill"), LOST, ids=range(len(LOST)))
@pytest.mark.parametrize("all_of_it", [False, True])
def test_a_lost_chunk_of_time_is_never_rows_of_one_moment(tmp_path, form, values, dtype, fill, all_of_it):
    source = write(tmp_path / "S.zarr", "time", values, dtype=dtype, fill=fill, form=form)
    whole = count_keys(tmp_path / "S.zarr" / "time")
    lost = slice(None) if all_of_it else slice(8, 12)
    zarr.open_array(tmp_path / "S.zarr" / "time")[lost] = fill
    assert count_keys(tmp_path / "S.zarr" / "time") < whole or form == "inner chunks"
    with pytest.raises(
        IntegrityError, match="the coordinate time beside .* lacks chunks .*strictly mono.*restore it, or"
    ):
        stored(source, tmp_path)
    assert not (tmp_path / "w.zarr").exists()
    result, report = stored(source, tmp_path, missing_chunks="fill")
    expected = np.array(values, dtype)
    expected[lost] = fill
    np.testing.assert_array_equal(result["time"][:], stack(expected, STARTS, 2), strict=True)
    assert report.runs[0].filled == ["time"]


def test_without_a_fill_value_nothing_is_filled(tmp_path):
    source = write(tmp_path / "S.zarr", "level", [0], fill=None, form="v2", columns=1)
    shutil.rmtree(tmp_path / "S.zarr" / "level" / "0", ignore_errors=True)
    (tmp_path / "S.zarr" / "level" / "0").unlink(missing_ok=True)
    with pytest.raises(IntegrityError, match="coordinate level .* has no fill value"):
        stored(source, tmp_path)


@pytest.mark.parametrize("missing", ["error", "fill"])
def test_what_is_no_file_is_never_absent(tmp_path, missing):
    """A file of git-annex that was not fetched is a link to nothing."""
    source = write(tmp_path / "S.zarr", "level", [850], columns=1)
    [chunk] = (tmp_path / "S.zarr" / "level" / "c").iterdir()
    chunk.unlink()
    chunk.symlink_to("nowhere")
    planned = pipeline.plan_windows(pipeline.open_matrix(source, missing_chunks=missing), STARTS, length=2)
    with pytest.raises(IntegrityError, match="level .*link to nothing"):
        pipeline.store(planned, tmp_path / "w.zarr")


def test_data_and_what_is_not_wanted(cli, tmp_path):
    """Absent chunks of data stay an error; a coordinate that does not travel is not asked for."""
    source = write(tmp_path / "S.zarr", "level", [3, 2, 0])
    zarr.open_array(tmp_path / "S.zarr" / "level")[:] = 0
    assert cli("run", source, "--count", 1, "--length", 2, "--out", "w.zarr").code == 4
    group = pipeline.open_matrix({"x": source, "y": source})
    result = pipeline.store(pipeline.plan_windows(group, STARTS, length=2), tmp_path / "g.zarr")
    np.testing.assert_array_equal(result["x"][:], stack(distinct(ROWS, (3,)), STARTS, 2))
    planned = pipeline.plan_windows(pipeline.open_matrix(source), STARTS, length=2)
    sums = pipeline.store(planned, tmp_path / "s.zarr", apply=lambda block: block.sum(axis=(1, 2)))
    assert set(sums.array_keys()) == {"windows", "starts"}
    [chunk] = [each for each in (source / "c").rglob("*") if each.is_file()]
    chunk.unlink()
    said = cli("run", source, "--count", 1, "--length", 2, "--out", "w.npy")
    assert said.code == 4
    assert "absent" in said.err


@pytest.mark.s3
@pytest.mark.parametrize("form", CHUNKS)
def test_in_a_bucket(bucket, tmp_path, form):
    write(tmp_path / "S.zarr", "level", [3, 2, 0], form=form)
    (tmp_path / "L.zarr").mkdir()
    objects = open_bucket(locate(f"{bucket.url}/S.zarr"))
    for path in (tmp_path / "S.zarr").rglob("*"):
        if path.is_file():
            objects.put(str(path.relative_to(tmp_path / "S.zarr")), path.read_bytes())
    result, report = stored(f"{bucket.url}/S.zarr/A", tmp_path)
    assert result["level"][:].tolist() == [3, 2, 0]
    assert report.runs[0].filled == ["level"]
    for key in list(objects.list_keys("level/")):
        if key.rpartition("/")[2].isdigit():
            objects.delete([key])
    with pytest.raises(IntegrityError, match="coordinate level beside .* lacks chunks"):
        stored(f"{bucket.url}/S.zarr/A", tmp_path / "L.zarr")
