"""Batches whose windows lie in few chunks, and which are random still. Pure NumPy; no data are read."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pipeline.arguments import check_flag, check_whole
from pipeline.matrix.rows import touched_units
from pipeline.plan.group import GroupPlan, check_plan
from pipeline.sinks.epochs import Epochs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from pipeline.plan.plan import Plan

_BLOCK_LENGTHS = 8
"""A block has as many lengths of a window or more: the last chunk that it touches belongs to the next block, too."""


class ChunkBatchSampler:
    """Batch sampler for windows of chunks that must be decoded whole: shuffled in two levels.

    A plain shuffle decodes a chunk for nearly every window. Here windows are grouped into blocks, by the chunk that
    they start in; an epoch shuffles the blocks, pools some of them, and shuffles the windows of each pool; batches come
    out of one pool after the other. So that a `WindowDataset`, which keeps the chunks that it decoded last, decodes
    most of them once an epoch in each process that reads.

    This is the two-level shuffle of CorgiPile (Xu et al., SIGMOD 2022), and the block sampling of scDataset (D'Ascenzo
    and Cultrera di Montesano, 2025), whose batch entropy is the measure of `randomness`.

    Parameters
    ----------
    plan
        As `plan_windows` gives it. Of a `GroupPlan` the array decides whose chunks are decoded, the longest of them.
    batch_size
        Windows of a batch.
    seed
        Of all permutations, with the epoch: 0 or more.
    blocks
        Blocks of a pool: more of them mix more, and take more memory. A block is a chunk, or as many adjacent ones as
        have the rows of eight windows; where chunks need not be decoded, a shard or file.
    drop_last
        Whether windows are left out that fill no whole batch on every rank. Otherwise the epoch's order is padded from
        its own beginning until every rank has as many.
    rank, world_size
        Of a distributed training: rank r takes the r-th part of the epoch's order, with pools of its own.

    Raises
    ------
    InputError
        If an argument cannot be used.

    Examples
    --------
    >>> import numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(6000.0).reshape(3000, 2))
    >>> settings = {"chunk_rows": 100, "shard_rows": 0, "compress": "zstd"}
    >>> matrix = pipeline.create_matrix(folder / "A.npy", folder / "A.zarr", **settings)
    >>> plan = pipeline.plan_windows(matrix, numpy.arange(0, 2985, 5), length=16)
    >>> sampler = pipeline.ChunkBatchSampler(plan, 32, blocks=8)
    >>> len(sampler), sorted(place for batch in sampler for place in batch) == list(range(len(plan)))
    (19, True)
    >>> sampler.count_decoded() < sampler.count_decoded(kept=False) < len(plan)
    True
    >>> 0.5 < sampler.randomness() < 1
    True
    """

    def __init__(
        self,
        plan: Plan | GroupPlan,
        batch_size: int,
        *,
        seed: int = 0,
        blocks: int = 16,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_plan(plan)
        self._epochs = Epochs(
            count=len(plan), batch_size=batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size
        )
        self._pool_blocks = check_whole("blocks", blocks, least=1)
        self._epoch = 0
        plans = plan.members.values() if isinstance(plan, GroupPlan) else [plan]
        chosen = max(plans, key=lambda each: (each.matrix.layout.reader == "decoded", _block_rows(each)))
        self._starts, self._length = chosen.starts, chosen.length
        layout = chosen.matrix.layout
        self._chunk_rows = layout.chunk_rows if layout.reader == "decoded" else 0
        self._block_rows = _block_rows(chosen)

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return len(self._epochs)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the places of each batch of the epoch: positions in the request."""
        share, _ = self._share()
        return (part.tolist() for part in self._cut(share))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch: its order follows from (seed, epoch)."""
        self._epoch = check_whole("epoch", epoch, least=0)

    def randomness(self) -> float:
        """How random the batches of this epoch are, from 0 to 1, where 1 is a plain shuffle.

        The mean, over batches, of the entropy of the blocks that a batch's windows come from, divided by the same of a
        plain shuffle. How far windows travel within the epoch is not in it: blocks do, all the way.
        """
        share, _ = self._share()
        epochs = self._epochs
        plain = epochs.take(epochs.permuted(self._epoch), epochs.rank, epochs.world_size)
        most = self._entropy(plain)
        return min(1.0, self._entropy(share) / most) if most else 1.0

    def count_decoded(self, *, kept: bool = True) -> int:
        """Count the chunks that this epoch decodes, of this rank; 0 where they need not be decoded.

        Parameters
        ----------
        kept
            Whether one process reads all batches, and keeps the chunks of a pool. Several decode up to as many each.
            Otherwise each batch decodes all that it touches.
        """
        check_flag("kept", kept)
        if not self._chunk_rows:
            return 0
        share, pools = self._share()
        return sum(len(self._touched(part)) for part in (pools if kept else self._cut(share)))

    def amplification(self, *, kept: bool = True) -> float:
        """Rows that this epoch decodes, divided by those of its windows: 1 where chunks need not be decoded.

        Parameters
        ----------
        kept
            As `count_decoded` takes it.
        """
        if not self._chunk_rows:
            return 1.0
        return self.count_decoded(kept=kept) * self._chunk_rows / (self._epochs.share * self._length)

    @cached_property
    def _blocks(self) -> list[NDArray[np.int64]]:
        """Places of each block's windows."""
        block = self._starts // self._block_rows
        ascending = np.argsort(block, kind="stable")
        return np.split(ascending, np.flatnonzero(np.diff(block[ascending])) + 1)

    def _share(self) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
        """Order of this rank's windows in the epoch, and the same cut by pools."""
        random = self._epochs.generator(self._epoch)
        shuffled = [self._blocks[number] for number in random.permutation(len(self._blocks))]
        pools = [
            random.permutation(np.concatenate(shuffled[begin : begin + self._pool_blocks]))
            for begin in range(0, len(shuffled), self._pool_blocks)
        ]
        borders = np.cumsum([len(pool) for pool in pools])
        share = self._epochs.share
        begin = self._epochs.rank * share
        mine = self._epochs.take(np.concatenate(pools), begin, 1)
        within = borders[(borders > begin) & (borders < begin + share)] - begin
        return mine, np.split(mine, within)

    def _cut(self, share: NDArray[np.int64]) -> Iterable[NDArray[np.int64]]:
        size = self._epochs.batch_size
        return (share[begin : begin + size] for begin in range(0, len(share), size))

    def _touched(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        starts = np.sort(self._starts[places])
        return touched_units(starts // self._chunk_rows, (starts + (self._length - 1)) // self._chunk_rows)

    def _entropy(self, share: NDArray[np.int64]) -> float:
        """Mean entropy of the blocks within a batch."""
        entropies = []
        for part in self._cut(self._starts[share] // self._block_rows):
            _, counts = np.unique(part, return_counts=True)
            parts = counts / len(part)
            entropies.append(-(parts * np.log(parts)).sum())
        return float(np.mean(entropies))


def _block_rows(plan: Plan) -> int:
    """Rows of a block."""
    layout = plan.matrix.layout
    if layout.reader != "decoded":
        return max(1, layout.file_rows)
    return -(-_BLOCK_LENGTHS * plan.length // layout.chunk_rows) * layout.chunk_rows
