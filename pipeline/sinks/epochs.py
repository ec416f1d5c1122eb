"""The order in which an epoch takes the windows of a request, and the share of each rank. Pure NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.arguments import check_flag, check_whole, show
from pipeline.errors import InputError

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
        check_flag("drop_last", self.drop_last)
        for name, least in (("batch_size", 1), ("seed", 0), ("world_size", 1), ("rank", 0)):
            # A number of NumPy would overflow where one of Python does not.
            object.__setattr__(self, name, check_whole(name, getattr(self, name), least=least))
        if self.rank >= self.world_size:
            raise InputError(
                f"rank is less than world_size; got rank {show(self.rank)} of {show(self.world_size)}; "
                "ranks count from 0"
            )
        if not len(self):
            raise InputError(
                f"an epoch has a batch; {self.count:,} windows on {show(self.world_size)} ranks fill none of "
                f"{show(self.batch_size)}, and drop_last leaves them out; take a smaller batch_size"
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

    def take(self, order: NDArray[np.int64], first: int, step: int) -> NDArray[np.int64]:
        """Take a rank's share of an epoch's order (count,): from `first` on every `step`-th, begun again at its end."""
        # What is taken one after the other comes from less than one round beyond the end: no sum is beyond 64 bits.
        return order[(first % self.count + np.arange(self.share) * (step % self.count)) % self.count]

    def permuted(self, epoch: int) -> NDArray[np.int64]:
        """Places (count,) of an epoch, permuted by (seed, epoch)."""
        return self.generator(epoch).permutation(self.count)

    def generator(self, epoch: int) -> np.random.Generator:
        """Random numbers of an epoch."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
