"""The order in which an epoch takes the windows of a request, and the share of each rank. Pure NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import InputError
from pipeline.intervals import check_whole
from pipeline.sizes import count_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """How windows come in batches, epoch after epoch. A frozen value: the same on every machine.

    Every rank has the same number of batches, of the same sizes: a distributed training waits for ever for a rank that
    has one less. Without `drop_last` the order is padded by its own beginning until ranks share it evenly; with it,
    what does not fill a whole batch on every rank is left out.
    """

    count: int
    """Windows of the request."""
    batch_size: int
    seed: int
    drop_last: bool
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, least=1)
        check_whole("seed", self.seed, least=0)
        check_whole("world_size", self.world_size, least=1)
        check_whole("rank", self.rank, least=0)
        if self.rank >= self.world_size:
            raise InputError(
                f"rank is less than world_size; got rank {self.rank} of {self.world_size}; ranks count from 0"
            )
        if not len(self):
            raise InputError(
                f"an epoch has a batch; {self.count:,} windows on {count_of(self.world_size, 'rank')} fill none of "
                f"{self.batch_size:,}, and drop_last leaves them out; take a smaller batch_size"
            )

    @property
    def share(self) -> int:
        """Windows of a rank in an epoch."""
        if self.drop_last:
            return self.count // (self.world_size * self.batch_size) * self.batch_size
        return -(-self.count // self.world_size)

    def __len__(self) -> int:
        """Batches of a rank in an epoch."""
        return (self.share + self.batch_size - 1) // self.batch_size

    def even(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pad an epoch's order (count,) by its beginning, or cut it, so that it has as many windows for every rank."""
        return np.resize(order, self.share * self.world_size)

    def permuted(self, epoch: int) -> NDArray[np.int64]:
        """Places (count,) of an epoch, permuted by (seed, epoch)."""
        return self.generator(epoch).permutation(self.count)

    def generator(self, epoch: int) -> np.random.Generator:
        """Random numbers of an epoch."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
