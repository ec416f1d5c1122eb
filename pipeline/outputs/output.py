"""Where an output goes, a folder or a place on an object store, and the output while it is being made there."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.integrity.record import seal_folder
from pipeline.matrix.arrays import local_folder
from pipeline.outputs.bucket import BucketOutput
from pipeline.outputs.folder import check_destination, is_finished, is_result, stage_output
from pipeline.outputs.shards import create_array, write_entries
from pipeline.plan.cost import writing_nbytes
from pipeline.runtime.preflight import FolderSight
from pipeline.storage.locations import check_apart, locate
from pipeline.storage.zarrconfig import pinned_config

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    import zarr
    from numpy.typing import NDArray

    from pipeline.outputs.folder import Stage as Staged
    from pipeline.outputs.journal import Request
    from pipeline.runtime.preflight import Sight
    from pipeline.storage.checksums import FileRecord
    from pipeline.storage.locations import Location, Url


class Writer(Protocol):
    """What tasks fill an array with. Picklable."""

    @property
    def array(self) -> zarr.Array[Any]:
        """What it fills; where that lies in a folder, workers must see it."""

    def write(
        self, first: int, stop: int, read: Callable[[int, int], NDArray[Any]], task: int | None
    ) -> list[FileRecord]:
        """Write entries [first, stop), whole files; see `shards.write_entries`.

        Parameters
        ----------
        task
            Number of the task that writes all its entries by this call; None: what is written belongs to none.

        Returns
        -------
        list of FileRecord
            Of each file; keys are relative to the output's root.
        """

    def sights(self) -> tuple[Sight, ...]:
        """What workers must see of the output."""


class Stage(Protocol):
    """An output that is being made."""

    @property
    def cut(self) -> int:
        """Units of a task; those of the earlier run, where there was one."""

    @property
    def done(self) -> dict[int, tuple[FileRecord, ...]]:
        """Tasks that are finished, by number, and what each wrote."""

    def create_group(self) -> None:
        """Make the output a group."""

    def create_array(self, name: str | None, **layout: Any) -> Writer:
        """Make an array in the group, or, without a name, make the output one; see `shards.create_array`."""

    def finish(self, *tasks: tuple[int, tuple[FileRecord, ...]]) -> None:
        """Note tasks as finished: what they wrote will outlive a crash, and was read back."""

    def expect(self, tasks: int) -> None:
        """Learn how many tasks there are, for `check_complete`, and for what is said where the run fails."""

    def check_complete(self) -> None:
        """Raise IntegrityError unless each expected task is finished."""

    def seal(self, files: Iterable[FileRecord], ours: dict[str, Any]) -> None:
        """Check that what was written is there, and nothing else, and record it; see `record.seal_folder`."""


class Output(Protocol):
    """Where an output goes."""

    @property
    def location(self) -> Location:
        """As it was named."""

    @property
    def place(self) -> Location:
        """The same, whatever the working directory becomes."""

    def check(self, *, nbytes: int, resume: bool = False, overwrite: bool) -> None:
        """Raise unless an output of `nbytes` may go there: nothing is there, or what the flags allow."""

    def check_apart(self, inputs: Iterable[str | Path | Url]) -> None:
        """Raise OutputExistsError where it is one of its inputs, lies inside of one, or holds one."""

    def is_result(self, request: Request) -> bool:
        """Whether the finished output of this very request is there, by what it says of itself."""

    def is_finished(self, request: Request) -> bool:
        """Whether it is there, and as it was written, which is looked at; its remains are swept.

        Raises
        ------
        IntegrityError
            If files of it are gone, or not what was written.
        """

    def stage(
        self, request: Request, *, cut: int, nbytes: int, resume: bool, overwrite: bool
    ) -> AbstractContextManager[Stage]:
        """Make the output there, which appears when the block ends; see `staging.stage_output`."""

    def writing_nbytes(self, file_nbytes: int, chunk_nbytes: int, *, plain: bool) -> int:
        """Memory that writing a file takes beside its entries, of plain chunks or through zarr."""

    def open_group(self) -> zarr.Group:
        """Open it for reading."""


def find_output(name: str | os.PathLike[str], options: Mapping[str, Any] | None) -> Output:
    """Tell where an output of this name goes; nothing is asked of a store yet.

    Raises
    ------
    InputError
        If nothing can be written there.
    """
    location = locate(name, options)
    return FolderOutput(location, location.absolute()) if isinstance(location, Path) else BucketOutput.at(location)


@dataclass(frozen=True, slots=True)
class FolderOutput:
    """A folder to be made; see `Output`."""

    location: Path
    place: Path
    """The same, whatever the working directory becomes."""

    def check(self, *, nbytes: int, resume: bool = False, overwrite: bool) -> None:
        """See `Output.check`."""
        check_destination(self.location, nbytes=nbytes, resume=resume, overwrite=overwrite)

    def check_apart(self, inputs: Iterable[str | Path | Url]) -> None:
        """See `Output.check_apart`."""
        check_apart(self.location, inputs)

    def is_result(self, request: Request) -> bool:
        """See `Output.is_result`."""
        return is_result(self.place, request)

    def is_finished(self, request: Request) -> bool:
        """See `Output.is_finished`."""
        return is_finished(self.place, request)

    @contextmanager
    def stage(self, request: Request, *, cut: int, nbytes: int, resume: bool, overwrite: bool) -> Iterator[FolderStage]:
        """See `Output.stage`."""
        given = {"resume": resume, "overwrite": overwrite}
        with stage_output(self.place, request, cut=cut, nbytes=nbytes, **given) as staged:
            yield FolderStage(staged)

    def writing_nbytes(self, file_nbytes: int, chunk_nbytes: int, *, plain: bool) -> int:
        """See `Output.writing_nbytes`."""
        return writing_nbytes(file_nbytes, chunk_nbytes, plain=plain)

    @pinned_config()
    def open_group(self) -> zarr.Group:
        """See `Output.open_group`."""
        import zarr

        return zarr.open_group(self.place, mode="r")


@dataclass(frozen=True, slots=True)
class FolderStage:
    """A folder that is being filled; see `Stage`."""

    staged: Staged

    @property
    def cut(self) -> int:
        """See `Stage.cut`."""
        return self.staged.cut

    @property
    def done(self) -> dict[int, tuple[FileRecord, ...]]:
        """See `Stage.done`."""
        return self.staged.done

    @pinned_config()
    def create_group(self) -> None:
        """See `Stage.create_group`."""
        import zarr

        from pipeline.storage.folderstore import FolderStore

        zarr.create_group(FolderStore(self.staged.output))

    def create_array(self, name: str | None, **layout: Any) -> FolderWriter:
        """See `Stage.create_array`."""
        return FolderWriter(create_array(self.staged.output, name, **layout))

    def finish(self, *tasks: tuple[int, tuple[FileRecord, ...]]) -> None:
        """See `Stage.finish`."""
        self.staged.finish(*tasks)

    def expect(self, tasks: int) -> None:
        """See `Stage.expect`."""
        self.staged.expect(tasks)

    def check_complete(self) -> None:
        """See `Stage.check_complete`; what workers left that ended is removed."""
        self.staged.check_complete()

    def seal(self, files: Iterable[FileRecord], ours: dict[str, Any]) -> None:
        """See `Stage.seal`."""
        seal_folder(self.staged.output, files, ours)


@dataclass(frozen=True, slots=True)
class FolderWriter:
    """Fills an array in a folder; see `Writer`."""

    array: zarr.Array[Any]

    def sights(self) -> tuple[Sight, ...]:
        """See `Writer.sights`."""
        folder = local_folder(self.array)
        return () if folder is None else (FolderSight(str(folder.absolute()), written=True),)

    def write(
        self,
        first: int,
        stop: int,
        read: Callable[[int, int], NDArray[Any]],
        task: int | None,  # noqa: ARG002 (the client notes it)
    ) -> list[FileRecord]:
        """See `Writer.write`."""
        prefix = f"{self.array.path}/" if self.array.path else ""
        return [file._replace(key=prefix + file.key) for file in write_entries(self.array, first, stop, read)]
