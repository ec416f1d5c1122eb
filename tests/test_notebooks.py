"""The notebooks run, and are kept with what they print.

`uv run python tests/test_notebooks.py` runs them and keeps their outputs anew.
"""

import re
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 (builds its cache here: where that is slow, it says so on stderr)
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))
TIMEOUT_SECONDS = 120
DASHBOARD = re.compile(r"dashboard: http://127\.0\.0\.1:\d+/status\n")
# A slash that begins a word: not of a tag, an address, a fraction or a comment of CSS.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<*})\]])/[A-Za-z_][\w.-]*|\b[A-Za-z]:\\")
ADDRESS = re.compile(r"\b(?!127\.0\.0\.1\b)\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b")


def run_notebook(notebook, folder):
    """Return the notebook as a fresh kernel leaves it, which began in `folder`; the first error is raised."""
    fresh = nbformat.from_dict(notebook)
    NotebookClient(
        fresh,
        timeout=TIMEOUT_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
    ).execute()
    return fresh


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_kinds(cell):
    """Kinds of a cell's outputs: streams by name, the others by what they can be shown as."""
    return {
        (output.output_type, *([output.name] if output.output_type == "stream" else sorted(output.get("data", {}))))
        for output in cell.outputs
    }


def output_texts(cell):
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        else:
            yield from (text for kind, text in output.get("data", {}).items() if not kind.startswith("image/"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request):
    kept = nbformat.read(request.param, as_version=4)
    nbformat.validate(kept)
    return kept


def test_runs_and_gives_outputs_of_the_kept_kinds(notebook, tmp_path, monkeypatch):
    folder, temporary, own = (tmp_path / name for name in ("folder", "temporary", "own"))
    for each in (folder, temporary, own):
        each.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    # The kernel of this environment, whatever the user has installed or set.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(own))

    fresh = run_notebook(notebook, folder)

    for kept_cell, fresh_cell in zip(code_cells(notebook), code_cells(fresh), strict=True):
        noise = [o.text for o in fresh_cell.outputs if o.output_type == "stream" and o.name == "stderr"]
        assert not DASHBOARD.sub("", "".join(noise)), f"on stderr, of:\n{fresh_cell.source}"
        assert output_kinds(kept_cell) == output_kinds(fresh_cell), f"kept and fresh outputs of:\n{fresh_cell.source}"
    assert not list(folder.iterdir())
    # Dask keeps one folder with its locks for all clusters of a machine.
    left = [each for each in temporary.rglob("*") if each.name != "dask-scratch-space" and each.suffix != ".lock"]
    assert not left


def test_kept_outputs_tell_nothing_of_the_machine(notebook):
    for cell in code_cells(notebook):
        for text in output_texts(cell):
            assert not ABSOLUTE_PATH.findall(text), f"absolute paths in an output of:\n{cell.source}"
            assert not ADDRESS.findall(text), f"addresses in an output of:\n{cell.source}"


def test_is_kept_as_one_clean_run_left_it(notebook):
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(not cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Matrix('/scratch/me/A.zarr')", True),
        ("File /home/me/a.py", True),
        ("<td>/work</td>", True),
        (r"C:\Users\me", True),
        ("<td>A.zarr</td><br/>", False),
        ("http://127.0.0.1:8787/status", False),
        ("MB/s, and/or 1 / a", False),
    ],
)
def test_absolute_paths_are_found(text, found):
    assert bool(ABSOLUTE_PATH.search(text)) == found


def keep_outputs(path):
    """Run a notebook and keep its outputs, without what differs by machine and hour."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        fresh = run_notebook(nbformat.read(path, as_version=4), folder)
    fresh.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in fresh.cells:
        cell.metadata = {}
    nbformat.write(fresh, path)


if __name__ == "__main__":
    for each in NOTEBOOKS:
        keep_outputs(each)
