"""No setting of Zarr that a user or a worker has changes a byte of what is read and written."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.buffer import cpu
from zarr.registry import get_codec_class, register_buffer, register_codec, register_ndbuffer

import pipeline
from pipeline.storage.zarrconfig import pinned_config, user_setting

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEFAULTS: dict[str, Any] = zarr.config.defaults[0]
STARTS = np.array([0, 3, 150, 77, 190, 3])
LENGTH = 7


def leaves(settings: dict[str, Any], *above: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and key != "codecs":
            yield from leaves(value, *above, key)
        else:
            yield ".".join((*above, key)), value


def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a user's setting was asked")


class HostileBuffer(cpu.Buffer):
    from_bytes = from_buffer = from_array_like = create_zero_length = classmethod(refuse)


class HostileNDBuffer(cpu.NDBuffer):
    from_numpy_array = from_ndarray_like = create = empty = classmethod(refuse)


register_buffer(HostileBuffer)
register_ndbuffer(HostileNDBuffer)


def hostile_codec(name: str) -> str:
    """Path of an implementation of a codec that can do nothing."""
    kind = get_codec_class(name)
    made = type(f"Hostile{kind.__name__}", (kind,), {"from_dict": classmethod(refuse), "__module__": __name__})
    register_codec(name, made, qualname=f"{__name__}.{made.__name__}")
    return f"{__name__}.{made.__name__}"


CODECS = {name: hostile_codec(name) for name in DEFAULTS["codecs"]}
HOSTILE: dict[str, list[Any]] = {
    "default_zarr_format": [2],
    "array.order": ["F"],
    "json_indent": [None, 7],
    "codec_pipeline.path": ["nowhere.Pipeline", "zarr.core.codec_pipeline.BatchedCodecPipeline"],
    "buffer": [f"{__name__}.HostileBuffer", "nowhere.Buffer"],
    "ndbuffer": [f"{__name__}.HostileNDBuffer", "nowhere.NDBuffer"],
    "async.timeout": [1e-9],
    "async.concurrency": [1, 0, "many"],
    "threading.max_workers": [1, 0, "many"],
    "codecs": [{}, CODECS],
}
"""By key; others by their kind."""


def hostile_values(key: str, default: Any) -> list[Any]:
    if key in HOSTILE:
        return HOSTILE[key]
    if isinstance(default, bool):
        return [not default]
    return [0, "many"]


CASES = [(key, value) for key, default in leaves(DEFAULTS) for value in hostile_values(key, default)]


def make_inputs(folder: Path) -> None:
    values = np.random.default_rng(0).integers(1, 9, (200, 6)).astype("f8") + np.arange(1200).reshape(200, 6)
    common: dict[str, Any] = {"shape": values.shape, "dtype": values.dtype, "config": {"write_empty_chunks": True}}
    shards = ShardingCodec(chunk_shape=(10, 6), codecs=[BytesCodec(), ZstdCodec(), Crc32cCodec()])
    arrays = {
        "shards": {"chunks": (50, 6), "serializer": shards, "compressors": None, "zarr_format": 3},
        "blosc": {"chunks": (40, 4), "compressors": [BloscCodec(typesize=8)], "zarr_format": 3},
        "plain": {"chunks": (40, 6), "compressors": None, "zarr_format": 3},
        "v2": {"chunks": (30, 6), "zarr_format": 2, "order": "F"},
    }
    for name, layout in arrays.items():
        zarr.create_array(folder / f"{name}.zarr", **common, **layout)[:] = values
    group = zarr.create_group(folder / "group.zarr", zarr_format=3)
    for name in ("x", "y"):
        group.create_array(name, chunks=(40, 6), **common)[:] = values
    np.save(folder / "A.npy", values)


CREATED: dict[str, Any] = {
    "shards.zarr": "zstd",
    "blosc.zarr": "blosc",
    "plain.zarr": None,
    "v2.zarr": None,
    "A.npy": None,
}
"""What matrices are made of, and how they are compressed."""


class StopError(Exception):
    pass


def do_all(folder: Path, opened: dict[str, Any]) -> dict[str, Any]:
    """Read, create, store, resume and verify; every byte of the outputs, and every value, by name."""
    found: dict[str, Any] = {}
    for name, compress in CREATED.items():
        matrix = pipeline.open_matrix(opened.get(name, folder / name))
        plan = pipeline.plan_windows(matrix, STARTS, length=LENGTH)
        found[f"gather {name}"] = pipeline.gather(plan)
        with pipeline.iter_batches(plan, 4) as batches:
            found[f"batches {name}"] = np.concatenate(list(batches))
        source = opened.get(name, folder / name)
        pipeline.create_matrix(source, folder / f"made-{name}.zarr", compress=compress, shard_rows=50, chunk_rows=5)
    plan = pipeline.plan_windows(pipeline.open_matrix(folder / "group.zarr"), STARTS, length=LENGTH)
    found |= {f"group {name}": array for name, array in pipeline.gather(plan).items()}
    pipeline.store(plan, folder / "made-group.zarr", order="chunk")
    plan = pipeline.plan_windows(pipeline.open_matrix(folder / "shards.zarr"), STARTS, length=LENGTH)
    given: dict[str, Any] = {"order": "chunk", "apply": fail_late}
    (folder / "fail").touch()
    with pytest.raises((StopError, RuntimeError)):
        pipeline.store(plan, folder / "made-store.zarr", **given)
    (folder / "fail").unlink()
    pipeline.store(plan, folder / "made-store.zarr", **given, resume=True)
    pipeline.store(plan, folder / "made-store.zarr", **given, resume=True)
    for out in sorted(folder.glob("made-*")):
        assert pipeline.verify(out) == []
        for file in sorted(out.rglob("*")):
            if file.is_file():
                found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def fail_late(block: Any) -> Any:
    """Fail on the windows that begin late, while a file says so."""
    if os.path.exists("fail") and block[:, 0, 0].max() > 900:  # noqa: PTH110
        raise StopError
    return block


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of inputs, and all that is made of them without settings; outputs name their inputs, so all lie there."""
    folder = tmp_path_factory.mktemp("settings")
    make_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = do_all(folder, {})
    clear(folder)
    return folder, found


def clear(folder: Path) -> None:
    import shutil

    for each in folder.glob("made-*"):
        shutil.rmtree(each)


@pytest.mark.parametrize("opened", [False, True], ids=["path", "array"])
@pytest.mark.parametrize(("key", "value"), CASES, ids=lambda each: str(each)[:40])
def test_no_setting_changes_a_byte(
    key: str, value: Any, opened: bool, expected: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, right = expected
    monkeypatch.chdir(folder)
    names = ("shards.zarr", "blosc.zarr", "v2.zarr")
    with zarr.config.set({key: value}):
        arrays = {}
        for name in names if opened else ():
            try:
                arrays[name] = zarr.open_array(folder / name, mode="r")
            except Exception:  # noqa: BLE001 (the user cannot open it so, either)
                continue
        try:
            found = do_all(folder, arrays)
        finally:
            clear(folder)
        if key in ("array.order", "default_zarr_format"):
            assert zarr.config.get(key) == value
    assert found.keys() == right.keys()
    for name, bytes_or_values in right.items():
        if isinstance(bytes_or_values, bytes):
            assert found[name] == bytes_or_values, name
        else:
            np.testing.assert_array_equal(found[name], bytes_or_values, err_msg=name)


def test_every_key_is_in_the_test() -> None:
    """A setting that a later Zarr brings is tried, too, by its kind."""
    assert {key for key, _ in leaves(DEFAULTS)} == {key for key, _ in CASES}


def test_the_hostile_ones_are() -> None:
    with zarr.config.set({"codecs": CODECS}), pytest.raises(RuntimeError, match="asked"):
        get_codec_class("zstd").from_dict({})
    with zarr.config.set({"codecs": CODECS}), pinned_config():
        assert get_codec_class("zstd") is ZstdCodec


def test_other_threads_keep_the_users_settings() -> None:
    with zarr.config.set({"array.order": "F", "async.concurrency": 3}):
        with pinned_config():
            seen: list[Any] = []
            thread = threading.Thread(target=lambda: seen.append(zarr.config.get("array.order")))
            thread.start()
            thread.join()
            assert (zarr.config.get("array.order"), seen) == ("C", ["F"])
            assert zarr.config.get("async.concurrency") == 3
            assert zarr.config.get("nothing.of.this", 5) == 5
            with pytest.raises(KeyError):
                zarr.config.get("nothing.of.this")
        assert zarr.config.get("array.order") == "F"
    assert user_setting("async.concurrency") is None


def test_apply_has_the_users_settings(expected: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = expected
    plan = pipeline.plan_windows(pipeline.open_matrix(folder / "shards.zarr"), STARTS, length=LENGTH)

    def apply(block: Any) -> Any:
        assert zarr.config.get("array.order") == "F"
        return block

    with zarr.config.set({"array.order": "F"}):
        pipeline.gather(plan, apply=apply)


HOSTILE_YAML = """
default_zarr_format: 2
array: {order: F, write_empty_chunks: true, read_missing_chunks: false}
codec_pipeline: {path: nowhere.Pipeline}
buffer: nowhere.Buffer
async: {timeout: 0.000000001}
"""


@pytest.mark.parametrize("where", ["environment", "file"])
@pytest.mark.parametrize("cluster", ["threads", "processes"])
def test_the_shell_and_its_workers(
    where: str, cluster: str, expected: tuple[Path, dict[str, Any]], program: str, tmp_path: Path
) -> None:
    folder, right = expected
    environment = dict(os.environ)
    if where == "file":
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "zarr.yaml").write_text(HOSTILE_YAML)
        environment["ZARR_CONFIG"] = str(tmp_path / "config")
    else:
        environment |= {
            "ZARR_DEFAULT_ZARR_FORMAT": "2",
            "ZARR_ARRAY__ORDER": "F",
            "ZARR_CODEC_PIPELINE__PATH": "nowhere.Pipeline",
            "ZARR_BUFFER": "nowhere.Buffer",
            "ZARR_ASYNC__TIMEOUT": "0.000000001",
        }
    (tmp_path / "cluster.yaml").write_text(
        f"version: 1\nkwargs: {{processes: {str(cluster == 'processes').lower()}}}\n"
    )
    np.save(tmp_path / "starts.npy", STARTS)
    common = ["--starts", "starts.npy", "--length", str(LENGTH), "--json"]
    lines = [
        ["create", folder / "v2.zarr", "made.zarr", "--compress", "zstd", "--json"],
        ["run", folder / "shards.zarr", "--out", "w.zarr", *common],
        ["run", folder / "shards.zarr", "--out", "w.zarr", "--resume", *common],
        ["run", folder / "v2.zarr", "--out", "w.npy", *common],
        ["verify", "w.zarr", "--json"],
        ["verify", "made.zarr", "--json"],
    ]
    for line in lines:
        done = subprocess.run(
            [program, *map(str, line)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "w.zarr", mode="r")["windows"][:], right["gather A.npy"])
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), right["gather A.npy"])
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "made.zarr", mode="r")[:], np.load(folder / "A.npy"))


def test_importable() -> None:
    assert importlib.import_module(__name__).HostileBuffer is HostileBuffer
