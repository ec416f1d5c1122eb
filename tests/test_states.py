"""Whatever happens in whatever order: success means the right values, an output is whole or absent, `verify` is right."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

ROWS, LENGTH = 96, 4
STARTS = {"few": np.array([3, 90, 40, 41, 8, 77]), "other": np.array([91, 0, 15, 60, 33, 34])}
CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "stat", "pwrite", "link")


class KilledError(BaseException):
    """The process is gone: from now on nothing that it calls happens."""


class Dying:
    """Lets so many calls of the system happen, and none after them."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise KilledError
            return real(*args, **kwargs)

        return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Outputs(RuleBasedStateMachine):
    """A matrix, and two outputs of it, against values that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("pipeline.plan.plan._LEAST_BLOCK_NBYTES", 1)
        self.patch.setattr("pipeline.plan.plan._FEWEST_TASKS", 3)
        (self.folder / "bystander").mkdir()
        (self.folder / "bystander" / "thesis.txt").write_text("mine")
        self.version = 0
        self.right: dict[str, NDArray[Any] | None] = {"w.zarr": None, "w.npy": None}
        """What each output holds; None where there is none."""
        self.pristine: dict[str, bytes] = {}
        """Files of the result in Zarr, as they were when it was finished."""

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.folder)

    def values(self) -> NDArray[Any]:
        return np.arange(ROWS * 5.0).reshape(ROWS, 5) + 1000 * self.version

    @initialize()
    def create(self) -> None:
        np.save(self.folder / "A.npy", self.values())
        pipeline.create_matrix(self.folder / "A.npy", self.folder / "A.zarr", shard_rows=16, chunk_rows=4)
        self.bystanders = contents(self.folder / "bystander")

    @rule()
    def rewrite(self) -> None:
        """The source becomes another one, and its matrix is made anew."""
        self.version += 1
        np.save(self.folder / "A.npy", self.values())
        pipeline.create_matrix(
            self.folder / "A.npy", self.folder / "A.zarr", shard_rows=16, chunk_rows=4, overwrite=True
        )
        assert pipeline.verify(self.folder / "A.zarr") == []

    def job(self, name: str, starts: str, **given: Any) -> NDArray[Any]:
        plan = pipeline.plan_windows(pipeline.open_matrix(self.folder / "A.zarr"), STARTS[starts], length=LENGTH)
        with dask.config.set(scheduler="synchronous"):
            if name == "w.npy":
                return np.array(pipeline.gather(plan, out=self.folder / name, **given))
            windows: NDArray[Any] = pipeline.store(plan, self.folder / name, **given)["windows"][:]
            return windows

    def expected(self, starts: str) -> NDArray[Any]:
        return np.stack([self.values()[start : start + LENGTH] for start in STARTS[starts].tolist()])

    def is_damaged(self) -> bool:
        path = self.folder / "w.zarr"
        return path.exists() and contents(path) != self.pristine

    def finish(self, name: str, windows: NDArray[Any]) -> None:
        self.right[name] = windows
        if name == "w.zarr":
            self.pristine = contents(self.folder / name)

    def inode(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_ino if path.exists() else None

    @rule(
        name=st.sampled_from(["w.zarr", "w.npy"]),
        starts=st.sampled_from(["few", "other"]),
        resume=st.booleans(),
        overwrite=st.booleans(),
        calls=st.none() | st.integers(0, 200),
    )
    def run(self, name: str, starts: str, resume: bool, overwrite: bool, calls: int | None) -> None:
        before, partial = self.inode(name), (self.folder / f"{name}.partial").exists()
        damaged = name == "w.zarr" and self.is_damaged()
        with pytest.MonkeyPatch.context() as patch:
            if calls is not None:
                dying = Dying(calls)
                for call in CALLS:
                    patch.setattr(os, call, dying.wrap(getattr(os, call)))
            try:
                made = self.job(name, starts, resume=resume, overwrite=overwrite)
            except KilledError:
                pass
            except pipeline.OutputExistsError:
                assert (before and not overwrite) or partial or damaged
                return
            except (pipeline.IntegrityError, pipeline.OpenError):
                assert damaged
                return
            else:
                patch.undo()
                assert not (self.folder / f"{name}.partial").exists()
                np.testing.assert_array_equal(made, self.expected(starts))
                self.finish(name, made)
                return
        if self.inode(name) != before and (found := self.read(name)) is not None:
            # Killed after the output had taken its place.
            np.testing.assert_array_equal(found, self.expected(starts))
            self.finish(name, found)

    @rule(
        name=st.sampled_from(["w.zarr", "w.npy"]),
        calls=st.integers(40, 200),
        where=st.integers(0, 2**40),
        how=st.sampled_from(["flip", "delete", "cut", "zero"]),
    )
    def interrupt(self, name: str, calls: int, where: int, how: str) -> None:
        """Killed, what was left damaged, and resumed."""
        self.run(name, "few", resume=False, overwrite=True, calls=calls)
        for output in (self.folder / f"{name}.partial").glob("output-*"):
            self._damage(output, where, how)
        self.run(name, "few", resume=True, overwrite=True, calls=None)

    def read(self, name: str) -> NDArray[Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return np.load(path) if name == "w.npy" else np.asarray(zarr.open_group(path, mode="r")["windows"])
        except Exception:  # noqa: BLE001 (damaged: zarr raises what it likes)
            return None

    # What is drawn must not depend on what is there: how many calls a run makes differs from one to the next.
    @rule(where=st.integers(0, 2**40), how=st.sampled_from(["flip", "delete", "cut", "zero"]))
    def damage(self, where: int, how: str) -> None:
        """A file of a finished output changes behind our back."""
        self._damage(self.folder / "w.zarr", where, how)

    @rule(where=st.integers(0, 2**40), how=st.sampled_from(["flip", "delete", "cut", "zero"]))
    def damage_remains(self, where: int, how: str) -> None:
        """So does one of an output that is not finished, or the journal itself."""
        for name in self.right:
            self._damage(self.folder / f"{name}.partial", where, how)

    def _damage(self, root: Path, where: int, how: str) -> None:
        found = [root] if root.is_file() else sorted(root.rglob("*"))
        # A file of two names is the finished output already.
        files = [path for path in found if path.is_file() and path.stat().st_size and path.stat().st_nlink == 1]
        if not files:
            return
        path = files[where % len(files)]
        content = bytearray(path.read_bytes())
        at = where // 64 % len(content)
        if how == "delete":
            path.unlink()
            return
        if how == "cut":
            del content[at:]
        elif how == "zero":
            if not any(content[at:]):
                content[at] = 1
            else:
                content[at:] = bytes(len(content) - at)
        else:
            content[at] ^= 1 << where % 8
        path.write_bytes(content)

    @rule()
    def verify(self) -> None:
        if not (self.folder / "w.zarr").exists():
            return
        try:
            problems: list[Any] = list(pipeline.verify(self.folder / "w.zarr"))
        except pipeline.PipelineError as error:
            problems = [error]
        assert bool(problems) == self.is_damaged()

    @rule(name=st.sampled_from(["w.zarr", "w.npy"]))
    def remove(self, name: str) -> None:
        """The user removes an output, or what is left of one."""
        for path in (self.folder / name, self.folder / f"{name}.partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.right[name] = None

    @invariant()
    def whole_or_absent(self) -> None:
        for name, right in self.right.items():
            if name == "w.zarr" and self.is_damaged():
                continue
            found = self.read(name)
            if right is None:
                assert found is None
            else:
                assert found is not None
                np.testing.assert_array_equal(found, right)

    @invariant()
    def nothing_else_changed(self) -> None:
        names = {"A.npy", "A.zarr", "bystander", *self.right, *(f"{name}.partial" for name in self.right)}
        assert {path.name for path in self.folder.iterdir()} <= names
        if hasattr(self, "bystanders"):
            assert contents(self.folder / "bystander") == self.bystanders


def run_states(examples: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Outputs,
        settings=settings(
            max_examples=examples,
            stateful_step_count=14,
            deadline=None,
            derandomize=True,
            # Shrinking takes minutes, and what fails depends on how many calls a run makes.
            phases=[Phase.explicit, Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_states() -> None:
    run_states(50)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_states() -> None:
    run_states(400)
