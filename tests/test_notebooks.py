"""The notebooks run, and are kept with what they print.

`uv run python tests/test_notebooks.py` runs them and keeps their outputs anew.
"""

import ast
import base64
import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 (builds its cache here: where that is slow, it says so on stderr)
import nbformat
import pytest
from nbclient import NotebookClient

TREE = Path(__file__).parents[1]
NOTEBOOKS = sorted(TREE.glob("notebooks/*.ipynb"))
TIMEOUT_SECONDS = 120
PICTURE_NBYTES = 100_000
"""At most, of each that is kept."""
QUESTIONS = {
    "01-quickstart.ipynb": """
assert (windows == recording[starts[:, None] + range(LENGTH)]).all()
assert np.allclose(rms, np.sqrt((windows.astype(float) ** 2).mean(axis=1)), rtol=1e-4)
""",
    "02-dashboard.ipynb": """
assert spectra.shape == (2000, 129) and np.allclose(spectra[:, 0].mean(), 256**2 / 4, rtol=0.01)
assert len(np.unique(crossings)) > 20 and np.array_equal(crossings, again)
assert [run.verb for run in report.runs] == ["gather", "store"] and not any(run.failed for run in report.runs)
assert in_processes.runs[0].threads == in_process.runs[0].threads == 2
""",
    "03-layouts.ipynb": """
factors = {key: amplification for key, (amplification, _) in measured.items()}
assert all(0.99 < factors["gather", "plain", rows] < 1.1 for rows in CHUNK_ROWS)
assert 126 < factors["loop", "plain", 2048] < 131
assert factors["gather", "zstd", 2048] < 40_000 / 4_800 < factors["loop", "zstd", 2048]
assert plan.chunk.amplification < 1 < plan.request.amplification
""",
    "04-training.ipynb": """
who = {name: {int(person_of[(parts == rows).all(axis=1)][0]) for rows in each} for name, each in within.items()}
assert not who["train"] & who["test"] and len(who["train"] | who["test"]) == 10
for name, each in starts.items():
    assert (parts[np.searchsorted(parts[:, 1], each, side="right"), 1] >= each + LENGTH).all()
assert np.mean(losses[-20:]) < losses[0] / 5
assert 0.7 < accuracies["test"][-1] < accuracies["leaking test"][-1] - 0.03
""",
}
"""What must hold of a notebook's variables, asked in its kernel after the last cell."""
DASHBOARD = re.compile(r"dashboard: http://127\.0\.0\.1:\d+/status(?: \(cluster file: cluster\.yaml\))?\n")
# A slash that begins a word: not of a tag, an address, a fraction or a comment of CSS.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<*})\]])/[A-Za-z_][\w.-]*|\b[A-Za-z]:\\")
ADDRESS = re.compile(r"\b(?!127\.0\.0\.1\b)\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b")


def run_notebook(notebook, folder):
    """Return the notebook as a fresh kernel leaves it, which began in `folder`; the first error is raised."""
    fresh = nbformat.from_dict(notebook)
    # How far a run has come is not kept.
    environment = os.environ | {"PIPELINE_PROGRESS": "0"}
    NotebookClient(
        fresh,
        timeout=TIMEOUT_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    ).execute(env=environment)
    return fresh


def ask(notebook, question):
    """Add a last cell that raises unless `question` holds."""
    asked = nbformat.from_dict(notebook)
    asked.cells.append(nbformat.v4.new_code_cell(question))
    return asked


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


def imported_modules(notebook):
    """Modules that a notebook cannot do without; what it imports on condition is left out."""
    for cell in code_cells(notebook):
        for statement in ast.parse(cell.source).body:
            if isinstance(statement, ast.Import):
                yield from (each.name.partition(".")[0] for each in statement.names)
            elif isinstance(statement, ast.ImportFrom):
                yield statement.module.partition(".")[0]


def declared_packages():
    """Names of what the package and its extra `notebooks` declare."""
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    own, *others = project["optional-dependencies"]["notebooks"]
    named = [
        word
        for extra in re.findall(r"[\w-]+", own.partition("[")[2])
        for word in project["optional-dependencies"][extra]
    ]
    words = [*project["dependencies"], *others, *named]
    return {project["name"], *(re.match(r"[\w.-]+", word)[0].lower() for word in words)}


def test_there_are_notebooks():
    assert [each.name for each in NOTEBOOKS] == list(QUESTIONS)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request):
    kept = nbformat.read(request.param, as_version=4)
    nbformat.validate(kept)
    return kept


def test_runs_and_gives_outputs_of_the_kept_kinds(notebook, request, tmp_path, monkeypatch):
    folder, temporary, own = (tmp_path / name for name in ("folder", "temporary", "own"))
    for each in (folder, temporary, own):
        each.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    # The kernel of this environment, whatever the user has installed or set.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(own))

    question = QUESTIONS[request.node.callspec.params["notebook"].name]
    fresh = run_notebook(ask(notebook, question), folder)

    for kept_cell, fresh_cell in zip(code_cells(notebook), code_cells(fresh)[:-1], strict=True):
        noise = [o.text for o in fresh_cell.outputs if o.output_type == "stream" and o.name == "stderr"]
        assert not DASHBOARD.sub("", "".join(noise)), f"on stderr, of:\n{fresh_cell.source}"
        assert output_kinds(kept_cell) == output_kinds(fresh_cell), f"kept and fresh outputs of:\n{fresh_cell.source}"
    assert not list(folder.iterdir())
    # Dask keeps one folder with its locks for all clusters of a machine, here in one of the user's own.
    kept = {"dask-scratch-space", f"random-windows-{os.geteuid()}"}
    left = [each for each in temporary.rglob("*") if each.name not in kept and each.suffix != ".lock"]
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


def test_keeps_text_and_small_pictures_and_no_error(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if output.output_type == "execute_result"]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    pictures += [each["image/png"] for cell in notebook.cells for each in cell.get("attachments", {}).values()]
    assert max(len(base64.b64decode(each)) for each in pictures) < PICTURE_NBYTES


def test_needs_no_more_than_the_extra(notebook):
    modules = set(imported_modules(notebook)) - sys.stdlib_module_names
    declared, homes = declared_packages(), packages_distributions()
    missing = {each for each in modules - {"pipeline"} if declared.isdisjoint(map(str.lower, homes.get(each, [])))}
    assert "pipeline" in modules
    assert not missing
    data = re.findall(r'distribution\("([\w-]+)"\)', "".join(cell.source for cell in code_cells(notebook)))
    assert declared.issuperset(data)


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
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                # Another program may have had Dask's usual port.
                output.text = DASHBOARD.sub("dashboard: http://127.0.0.1:8787/status\n", output.text)
    nbformat.write(fresh, path)


if __name__ == "__main__":
    for each in NOTEBOOKS:
        keep_outputs(each)
