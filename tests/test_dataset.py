"""Windows by their place, in loaders of others; and batches that touch few chunks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from pipeline.errors import InputError, IntegrityError
from pipeline.readers import decoded as decoding
from tests.layouts import LAYOUTS, distinct, open_layout, stack

LENGTH = 7
COUNT = 60
NAMES = ["npy", "zstd", "blosc-plain", "shards", "big-endian", "columns", "plain", "plain@objects", "zstd@objects"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("dataset")
    for name in NAMES:
        if "@" not in name:
            LAYOUTS[name][1](made / f"{name}.zarr", distinct())
    return made


@pytest.fixture(scope="module")
def starts():
    made = np.random.default_rng(5).integers(0, len(distinct()) - LENGTH + 1, COUNT)
    made[:2] = 0, len(distinct()) - LENGTH
    return made


@pytest.fixture(scope="module")
def windows(starts):
    return stack(distinct(), starts, LENGTH)


def plan_of(folder, starts, name):
    return pipeline.plan_windows(open_layout(folder, name), starts, length=LENGTH)


def test_places_of_every_kind(folder, starts, windows):
    dataset = pipeline.WindowDataset(plan_of(folder, starts, "npy"))
    np.testing.assert_array_equal(dataset[np.array(3)], windows[3])
    np.testing.assert_array_equal(dataset[2:9:3], windows[2:9:3])
    for wrong in (True, 1.5, "a"):
        with pytest.raises(InputError, match="^(a place is|places)"):
            dataset[wrong]


def test_a_matrix_is_no_plan(folder):
    matrix = open_layout(folder, "npy")
    for function in (
        pipeline.WindowDataset,
        lambda given: pipeline.ChunkBatchSampler(given, 4),
        lambda given: pipeline.iter_batches(given, 4),
    ):
        with pytest.raises(InputError, match="a plan is what plan_windows gives; got Matrix"):
            function(matrix)


@pytest.mark.parametrize("keep", [None, 0, 3000])
@pytest.mark.parametrize("name", NAMES)
def test_windows_of_every_reader(folder, starts, windows, name, keep):
    dataset = pipeline.WindowDataset(plan_of(folder, starts, name), keep=keep)
    assert len(dataset) == COUNT
    for place in (0, 1, COUNT - 1, -1, -COUNT, np.int64(5)):
        window = dataset[place]
        np.testing.assert_array_equal(window, windows[place])
        assert window.flags.writeable
        assert window.dtype == windows.dtype
        np.testing.assert_array_equal(np.from_dlpack(window), windows[place])
        window[:] = -1
    places = [3, 1, 1, -2, 59]
    np.testing.assert_array_equal(dataset[places], windows[places])
    batch = dataset.__getitems__(places)
    assert isinstance(batch, list)
    np.testing.assert_array_equal(np.stack(batch), windows[places])
    assert dataset[[]].shape == (0, *windows.shape[1:])
    for outside in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            _ = dataset[outside]
        with pytest.raises(IndexError):
            dataset.__getitems__([0, outside])
    with pytest.raises(InputError, match="^(a place is|places)"):
        _ = dataset[[0.5]]
    # A loop without a loader ends, as over any sequence.
    assert sum(1 for _ in dataset) == COUNT


@pytest.mark.parametrize(
    "apply",
    [lambda block: block, lambda block: block.mean(axis=(1, 2)), lambda block: block[:, ::-1, 0], np.sqrt],
    ids=["same", "mean", "view", "ufunc"],
)
def test_apply_sees_blocks(folder, starts, windows, apply):
    dataset = pickle.loads(pickle.dumps(pipeline.WindowDataset(plan_of(folder, starts, "zstd"), apply=apply)))
    expected = apply(windows)
    batch = dataset[[4, 2, 9]]
    np.testing.assert_array_equal(batch, expected[[4, 2, 9]])
    assert batch.flags.writeable
    assert batch.flags.c_contiguous
    np.testing.assert_array_equal(dataset[7], expected[7])


def test_a_group_of_arrays_gives_dicts(folder, starts, windows):
    group = pipeline.open_matrix({"x": folder / "npy.zarr", "y": folder / "zstd.zarr"})
    plan = pipeline.plan_windows(group, starts, length=LENGTH)
    dataset = pipeline.WindowDataset(plan, apply={"y": lambda block: block[:, 0]})
    np.testing.assert_array_equal(dataset[3]["x"], windows[3])
    np.testing.assert_array_equal(dataset[[3, 5]]["y"], windows[[3, 5], 0])
    first, second = dataset.__getitems__([8, 9])
    np.testing.assert_array_equal(first["x"], windows[8])
    np.testing.assert_array_equal(second["y"], windows[9, 0])
    assert len(pipeline.ChunkBatchSampler(plan, 7)) == 9


def test_a_file_that_changed_before_a_process_reads(tmp_path, starts):
    np.save(tmp_path / "A.npy", distinct())
    plan = pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.npy"), starts, length=LENGTH)
    sent = pickle.dumps(pipeline.WindowDataset(plan))
    os.utime(tmp_path / "A.npy", ns=(1, 1))
    with pytest.raises(IntegrityError, match="was changed"):
        _ = pickle.loads(sent)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads
class TestProcesses:
    @pytest.mark.parametrize("name", ["npy", "zstd", "columns"])
    def test_forked_ones_read(self, folder, starts, windows, name):
        dataset = pipeline.WindowDataset(plan_of(folder, starts, name))
        _ = dataset[0]
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            np.testing.assert_array_equal(pool.submit(dataset.__getitem__, [5, 6]).result(), windows[[5, 6]])

    def test_forked_ones_have_no_connections_of_their_parent(self, folder, starts):
        dataset = pipeline.WindowDataset(plan_of(folder, starts, "plain@objects"))
        inherited = _inherit(dataset)
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            read = pool.submit(_read_inherited, inherited)
            with pytest.raises(InputError, match="multiprocessing_context='spawn'"):
                read.result()

    def test_spawned_ones_read(self, folder, starts, windows):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            for name in ("zstd", "plain@objects"):
                dataset = pipeline.WindowDataset(plan_of(folder, starts, name), apply=_double)
                np.testing.assert_array_equal(pool.submit(_read, dataset, [5, 6]).result(), 2 * windows[[5, 6]])

    def test_no_dask_is_loaded_and_no_torch(self, folder, starts, tmp_path):
        sent = tmp_path / "dataset.pickle"
        sent.write_bytes(pickle.dumps(pipeline.WindowDataset(plan_of(folder, starts, "zstd"))))
        code = (
            "import pickle, pathlib, sys; "
            f"d = pickle.loads(pathlib.Path({str(sent)!r}).read_bytes()); d.__getitems__([1, 2]); "
            "print(*{'dask', 'distributed', 'torch'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == ""


_inherited = {}


def _inherit(dataset):
    _inherited[0] = dataset
    return 0


def _read_inherited(number):
    return _inherited[number][0]


def _read(dataset, places):
    return dataset[places]


def _double(block):
    return 2 * block


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """2,400 windows out of 60 compressed chunks of 50 rows."""
    made = tmp_path_factory.mktemp("dense")
    a = distinct(3000, (2,))
    np.save(made / "A.npy", a)
    matrix = pipeline.create_matrix(made / "A.npy", made / "A.zarr", shard_rows=0, chunk_rows=50, compress="zstd")
    assert matrix.layout.reader == "decoded"
    starts = pipeline.draw_starts(3000, length=LENGTH, count=2400, seed=1)
    return pipeline.plan_windows(matrix, starts, length=LENGTH), stack(a, starts, LENGTH)


def decoded(dense, monkeypatch, order, *, keep):
    """How many chunks are decoded when batches are read in an order, each checked."""
    plan, windows = dense
    count = 0
    original = decoding.chunk_decoder

    def counting(array):
        decode = original(array)

        def counted(*arguments):
            nonlocal count
            count += 1
            return decode(*arguments)

        return counted

    dataset = pipeline.WindowDataset(plan, keep=keep)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "chunk_decoder", counting)
        for places in order:
            np.testing.assert_array_equal(dataset[places], windows[places])
    return count


class TestSampler:
    def test_chunks_are_decoded_about_once(self, dense, monkeypatch):
        plan, _ = dense
        sampler = pipeline.ChunkBatchSampler(plan, 64, blocks=8)
        kept = decoded(dense, monkeypatch, sampler, keep="1MiB")
        alone = decoded(dense, monkeypatch, sampler, keep=0)
        plain = np.random.default_rng(0).permutation(len(plan)).reshape(-1, 60).tolist()
        shuffled = decoded(dense, monkeypatch, plain, keep=0)
        # 60 chunks, and of each block, two chunks long, its neighbour.
        assert kept <= sampler.count_decoded() <= 60 * 1.5 + 1
        assert alone == sampler.count_decoded(kept=False)
        assert 5 * alone < 3 * shuffled
        assert 10 * kept < shuffled
        assert sampler.amplification() == sampler.count_decoded() * 50 / (2400 * LENGTH)
        assert 0.6 < sampler.randomness() < 0.95

    def test_what_is_kept_is_bounded(self, dense):
        plan, _ = dense
        dataset = pipeline.WindowDataset(plan, keep=3 * 50 * 16)
        for places in pipeline.ChunkBatchSampler(plan, 64):
            _ = dataset[places]
            kept = dataset._members[""].kept.values()
            assert sum((each if each.base is None else each.base).nbytes for each in kept) <= 3 * 50 * 16

    def test_of_a_group_the_array_decides_that_is_decoded(self, dense, tmp_path):
        dense, _ = dense
        np.save(tmp_path / "y.npy", np.arange(dense.matrix.rows))
        group = pipeline.open_matrix({"x": dense.matrix, "y": tmp_path / "y.npy"})
        both = pipeline.plan_windows(group, dense.starts, length=dense.length)
        alone, beside = (pipeline.ChunkBatchSampler(plan, 16, blocks=3) for plan in (dense, both))
        assert beside.count_decoded() == alone.count_decoded() > 0
        assert beside.randomness() == alone.randomness() < 0.95

    def test_more_ranks_are_not_more_random(self, dense):
        dense, _ = dense
        scores = [
            pipeline.ChunkBatchSampler(dense, 16, blocks=2, world_size=world_size).randomness() for world_size in (1, 4)
        ]
        assert scores[1] < scores[0] * 1.1

    def test_more_blocks_are_more_random(self, dense):
        plan, _ = dense
        scores = [pipeline.ChunkBatchSampler(plan, 64, blocks=blocks).randomness() for blocks in (1, 4, 16, 1000)]
        assert scores == sorted(scores)
        assert scores[0] < 0.2
        assert scores[-1] > 0.99

    def test_nothing_to_decode(self, folder, starts):
        sampler = pipeline.ChunkBatchSampler(plan_of(folder, starts, "npy"), 8)
        assert (sampler.count_decoded(), sampler.amplification(), sampler.randomness()) == (0, 1.0, 1.0)

    @given(
        size=st.integers(1, 99),
        seed=st.integers(0, 2**40),
        blocks=st.integers(1, 99),
        epoch=st.integers(0, 9),
        world_size=st.integers(1, 5),
        drop_last=st.booleans(),
    )
    @settings(max_examples=60, deadline=None)
    def test_ranks_share_each_epoch(self, dense, size, seed, blocks, epoch, world_size, drop_last):
        plan, _ = dense
        ranks = []
        for rank in range(world_size):
            how = {"seed": seed, "blocks": blocks, "drop_last": drop_last, "rank": rank, "world_size": world_size}
            sampler = pipeline.ChunkBatchSampler(plan, size, **how)
            sampler.set_epoch(epoch)
            ranks.append(list(sampler))
            assert len(sampler) == len(ranks[-1])
            assert list(sampler) == ranks[-1]
            assert 0 <= sampler.randomness() <= 1
        assert len({tuple(map(len, each)) for each in ranks}) == 1
        everything = [place for each in ranks for batch in each for place in batch]
        assert all(type(place) is int for place in everything[:3])
        if drop_last:
            assert len(set(everything)) == len(everything) > 2400 - size * world_size
        else:
            assert set(everything) == set(range(2400))
            assert len(everything) < 2400 + world_size

    def test_epochs_and_seeds_differ(self, dense):
        plan, _ = dense
        orders = set()
        for seed in (0, 1):
            sampler = pipeline.ChunkBatchSampler(plan, 64, seed=seed)
            for epoch in (0, 1):
                sampler.set_epoch(epoch)
                orders.add(str(list(sampler)))
        assert len(orders) == 4

    @pytest.mark.parametrize("wrong", [{"blocks": 0}, {"batch_size": 0}, {"seed": -1}, {"rank": 1}])
    def test_wrong_arguments(self, dense, wrong):
        with pytest.raises(InputError):
            pipeline.ChunkBatchSampler(dense[0], **{"batch_size": 5} | wrong)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads
class TestTorch:
    """Where torch is installed."""

    @pytest.mark.parametrize("context", ["fork", "spawn"])
    def test_a_loader_with_workers(self, dense, context):
        data = pytest.importorskip("torch.utils.data")
        plan, windows = dense
        dataset = pipeline.WindowDataset(plan)
        sampler = pipeline.ChunkBatchSampler(plan, 256, blocks=4)
        settings = {"num_workers": 2, "multiprocessing_context": context}
        got = list(data.DataLoader(dataset, batch_size=None, sampler=sampler, **settings))
        places = list(sampler)
        assert len(got) == len(places) == 10
        for batch, each in zip(got, places, strict=True):
            np.testing.assert_array_equal(batch.numpy(), windows[each])
        if context == "fork":
            got = list(data.DataLoader(dataset, batch_sampler=sampler, **settings))
            np.testing.assert_array_equal(got[3].numpy(), windows[places[3]])
            got = list(data.DataLoader(dataset, batch_size=100, **settings))
            np.testing.assert_array_equal(np.concatenate([batch.numpy() for batch in got]), windows)

    def test_dlpack_shares_the_memory_of_a_batch(self, dense):
        torch = pytest.importorskip("torch")
        plan, windows = dense
        with pipeline.iter_batches(plan, 100) as batches:
            batch = next(batches)
            tensor = torch.from_dlpack(batch)
            np.testing.assert_array_equal(tensor.numpy(), windows[:100])
            tensor[0, 0, 0] = -1
            assert batch[0, 0, 0] == -1
