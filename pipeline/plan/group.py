"""The plan of several matrices that share their rows: the same windows of each; and planning one or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from pipeline.arguments import show
from pipeline.errors import InputError
from pipeline.formatting import count_of, format_size, html_table, text_table
from pipeline.matrix.matrix import Matrix
from pipeline.matrix.opening import MatrixGroup
from pipeline.plan.plan import Cost, Plan, cost_bars, order_starts, plan_single, say_crossings

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from pipeline.plan.plan import Order


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class GroupPlan:
    """The same windows of several matrices, and what reading them will cost. Frozen; made by `plan_windows`."""

    matrix: MatrixGroup
    members: dict[str, Plan]
    """A plan for each array, by name; all share the arrays of starts."""

    def __len__(self) -> int:
        """Windows of each array."""
        return len(self._first)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GroupPlan):
            return NotImplemented
        return self.members == other.members

    __hash__ = None  # type: ignore[assignment]

    @property
    def starts(self) -> NDArray[np.int64]:
        """(n,) in request order, read-only."""
        return self._first.starts

    @property
    def sorted_starts(self) -> NDArray[np.int64]:
        """(n,) ascending, read-only: order `chunk`."""
        return self._first.sorted_starts

    @property
    def sorted_places(self) -> NDArray[np.int64]:
        """(n,) place of each of `sorted_starts`."""
        return self._first.sorted_places

    @property
    def length(self) -> int:
        """Rows of a window."""
        return self._first.length

    @property
    def memory(self) -> int | None:
        """Limit in bytes that the user set, for all together."""
        return self._first.memory

    @property
    def window_nbytes(self) -> int:
        """Bytes of one window of each."""
        return sum(each.window_nbytes for each in self.members.values())

    @property
    def nbytes(self) -> int:
        """Bytes that were asked for: of all windows of all arrays."""
        return sum(each.nbytes for each in self.members.values())

    @property
    def reading_nbytes(self) -> int:
        """Memory that reading takes beside the windows themselves, a task: tasks are of one array each."""
        return max(each.reading_nbytes for each in self.members.values())

    @property
    def chunk(self) -> Cost:
        """Cost of order `chunk`, of all together."""
        return self.cost("chunk")

    @property
    def request(self) -> Cost:
        """Cost of order `request`, of all together."""
        return self.cost("request")

    def cost(self, order: Order) -> Cost:
        """Cost of one order, of all together."""
        costs = [each.cost(order) for each in self.members.values()]
        nbytes_read = sum(each.nbytes_read for each in costs)
        return Cost(
            order,
            tasks=sum(each.tasks for each in costs),
            chunks=sum(each.chunks for each in costs),
            nbytes_read=nbytes_read,
            amplification=nbytes_read / self.nbytes,
            scratch_nbytes=max(each.scratch_nbytes for each in costs),
            requests=sum(each.requests for each in costs),
        )

    def crossings(self) -> int:
        """How many windows cross the border of two parts of an array: the most of any."""
        return max(each.crossings() for each in self.members.values())

    def facts(self) -> dict[str, str]:
        """What a person wants to know, as words."""
        facts = {
            "matrix": self.matrix.path,
            "windows": f"{len(self):,} of {self.length:,} rows, of each of {count_of(len(self.members), 'array')}",
            "wanted": format_size(self.nbytes),
        }
        for sink, cost in (("gather (order chunk)", self.chunk), ("store (order request)", self.request)):
            facts[sink] = (
                f"{count_of(cost.tasks, 'task')}, {count_of(cost.chunks, 'chunk')}, "
                f"reads {format_size(cost.nbytes_read)}, amplification {cost.amplification:.2f}"
            )
        if self.request.nbytes_read > 2 * self.chunk.nbytes_read:
            facts["store (order chunk)"] = "as gather, with places beside the sorted windows: far less"
        for name, each in self.members.items():
            shape = ", ".join(f"{size:,}" for size in each.window_shape)
            facts[name] = (
                f"({len(each):,}, {shape}), {format_size(each.nbytes)}, amplification "
                f"{each.chunk.amplification:.2f} gathered, {each.request.amplification:.2f} stored"
            )
        facts["memory of gather"] = (
            f"{format_size(self.nbytes)} for the results + {format_size(self.reading_nbytes)} a thread"
        )
        if crossings := self.crossings():
            facts["crossings"] = say_crossings(crossings)
        return facts

    @property
    def _first(self) -> Plan:
        return next(iter(self.members.values()))

    def __repr__(self) -> str:
        return text_table("GroupPlan", self.facts())

    def plot(self) -> list[Axes]:
        """Draw each member as `Plan.plot` does, in a figure of its own."""
        drawn = []
        for name, plan in self.members.items():
            ax = plan.plot()
            ax.set_title(f"{name}: {ax.get_title(loc='left')}", loc="left", fontsize=10)
            drawn.append(ax)
        return drawn

    def _repr_html_(self) -> str:
        return html_table("GroupPlan", self.facts(), cost_bars(self.nbytes, self.chunk, self.request))


type Columns = slice | ArrayLike
"""Of the first axis of a row."""


@overload
def plan_windows(
    matrix: Matrix,
    starts: ArrayLike,
    *,
    length: int,
    memory: int | str | None = None,
    columns: Columns | None = None,
    dtype: DTypeLike | None = None,
) -> Plan: ...


@overload
def plan_windows(
    matrix: MatrixGroup,
    starts: ArrayLike,
    *,
    length: int,
    memory: int | str | None = None,
    columns: Mapping[str, Columns] | None = None,
    dtype: Mapping[str, DTypeLike] | None = None,
) -> GroupPlan: ...


def plan_windows(
    matrix: Matrix | MatrixGroup,
    starts: ArrayLike,
    *,
    length: int,
    memory: int | str | None = None,
    columns: Any = None,
    dtype: Any = None,
) -> Plan | GroupPlan:
    """Plan the reading of windows `A[start:start + length]`; reads no data.

    Parameters
    ----------
    matrix
        As `open_matrix` gives it: one, or several that share their rows.
    starts
        (n,) whole numbers of any width, each in [0, rows - length]; in any order, repeated or overlapping.
    length
        Rows of a window, 1 to rows.
    memory
        Limit in bytes, or text such as "8GB", for all that the run holds; the machine's own limits hold beside it.
    columns
        What is delivered of each row: a slice of its first axis, or whole numbers, negative ones from the end, in any
        order, repeated or not. A slice that begins or ends outside the row is an error, not clipped. One run of columns
        is read alone where that is less work than reading whole rows. Of several matrices a mapping by their names.
        Default: all.
    dtype
        Of the values as delivered: one that they can be cast to within their kind (`same_kind` of `numpy.can_cast`).
        Floats may be rounded; a value that is lost otherwise is an IntegrityError of the run. Of several matrices a
        mapping by their names. Default: as stored.

    Returns
    -------
    Plan
        Or, of a `MatrixGroup`, a `GroupPlan`: a plan for each array, of the same starts.

    Raises
    ------
    InputError
        If a start, a column, the length or the limit is no such number, or values cannot be cast so.
    BudgetError
        If so many windows cannot be planned in the memory that is free.

    Examples
    --------
    >>> import numpy, pipeline
    >>> folder = getfixture("tmp_path")
    >>> numpy.save(folder / "A.npy", numpy.arange(600.0).reshape(300, 2))
    >>> matrix = pipeline.create_matrix(folder / "A.npy", folder / "A.zarr")
    >>> plan = pipeline.plan_windows(matrix, [200, 7, 7], length=16)
    >>> len(plan), plan.nbytes, plan.chunk.tasks
    (3, 768, 1)

    Part of each row, and as another dtype:

    >>> plan = pipeline.plan_windows(matrix, [200, 7, 7], length=16, columns=[-1], dtype="float32")
    >>> plan.window_shape, plan.dtype, plan.nbytes
    ((16, 1), dtype('float32'), 192)
    >>> pipeline.gather(plan)[0, :3, 0].tolist()
    [401.0, 403.0, 405.0]

    Of several arrays:

    >>> numpy.save(folder / "y.npy", numpy.arange(300) % 4)
    >>> both = pipeline.open_matrix({"features": folder / "A.zarr", "labels": folder / "y.npy"})
    >>> windows = pipeline.gather(pipeline.plan_windows(both, [200, 7], length=16))
    >>> windows["features"].shape, windows["labels"].shape
    ((2, 16, 2), (2, 16))
    """
    if not isinstance(matrix, Matrix | MatrixGroup):
        raise InputError(f"a plan is of a matrix; got {type(matrix).__name__}; open it with open_matrix")
    length = matrix.check_length(length)
    ordered = order_starts(starts, rows=matrix.rows, length=length)
    if isinstance(matrix, Matrix):
        return plan_single(matrix, ordered, length=length, memory=memory, columns=columns, dtype=dtype)
    chosen = by_member(columns, matrix.members, "columns")
    dtypes = by_member(dtype, matrix.members, "dtype")
    members = {
        name: plan_single(each, ordered, length=length, memory=memory, columns=chosen[name], dtype=dtypes[name])
        for name, each in matrix.members.items()
    }
    return GroupPlan(matrix, members)


def check_plan(plan: object) -> None:
    """Raise InputError where something else was given, such as a matrix."""
    if not isinstance(plan, Plan | GroupPlan):
        raise InputError(f"a plan is what plan_windows gives; got {type(plan).__name__}; plan its windows first")


def plans_of(plan: Plan | GroupPlan, alone: str) -> dict[str, Plan]:
    """Give the plan of each array by its name; `alone` is that of the array of a plan of one."""
    check_plan(plan)
    return plan.members if isinstance(plan, GroupPlan) else {alone: plan}


def by_member(given: Any, members: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Give each member of a group its value of a mapping by their names, None where it has none.

    Parameters
    ----------
    given
        A mapping, or None for none at all.
    what
        Names the argument in messages.

    Raises
    ------
    InputError
        If it is no mapping, or names what is no member.
    """
    if given is None:
        return dict.fromkeys(members)
    if not isinstance(given, Mapping):
        raise InputError(
            f"{what} of several arrays is a mapping by their names; got {type(given).__name__}; "
            f"write {{{next(iter(members))!r}: ...}}"
        )
    if unknown := [each for each in given if each not in members]:
        raise InputError(f"{what} names arrays of the group; got {show(unknown[0])}; it has {', '.join(members)}")
    return {name: given.get(name) for name in members}
