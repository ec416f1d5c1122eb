"""Who may import whom, and what is loaded when: imports point downwards, inside functions, too."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline

PACKAGE = Path(pipeline.__file__).parent
GROUND = ["errors", "redaction", "arguments", "formatting", "process", "memory"]
"""Modules at the top of the package, which every folder may import."""
FOLDERS = {
    "cli": "bench sinks outputs integrity runtime readers plan cluster matrix storage",
    "bench": "sinks outputs integrity runtime readers plan cluster matrix storage",
    "sinks": "outputs integrity runtime readers plan cluster matrix storage",
    "outputs": "integrity runtime plan matrix storage",
    "integrity": "runtime matrix storage",
    "runtime": "readers plan matrix cluster storage",
    "readers": "plan matrix storage",
    "plan": "matrix storage",
    "cluster": "storage",
    "matrix": "storage",
    "storage": "",
}
"""Each folder, and the folders that it may import."""
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
}
"""Files by their dotted names below the package."""

OUTSIDE = {
    "asyncssh": "cluster.ssh",
    "bokeh": "",
    "botocore": "storage.credentials",
    "click": "cli",
    "cloudpickle": "cli.request runtime.identity runtime.tasks",
    "cryptography": "cluster.security",
    "dask": "bench cli cluster runtime",
    "distributed": "bench cluster process runtime",
    "fsspec": "storage.locations",
    "google_crc32c": "integrity matrix.chunks outputs.encoding readers.codecs",
    "h5py": "bench matrix.hdf5 matrix.hdf5_filters matrix.hdf5_references",
    "hdf5plugin": "matrix.hdf5_filters",
    "matplotlib": "bench plan runtime.report",
    "msgspec": "cli.config cluster.spec integrity matrix.notice outputs storage.trust",
    "numcodecs": "bench matrix.bounded_codecs matrix.decompress matrix.hdf5_filters",
    "obstore": "matrix.keys storage",
    "tensorstore": "bench",
    "torch": "bench",
    "tornado": "cluster",
    "tqdm": "runtime.progress",
    "yaml": "cluster.spec",
    "zarr": "bench cli.config integrity matrix outputs readers runtime sinks storage",
}
"""Folders and modules that may import what is heavy or has a home; NumPy and the standard library are for all."""

HEAVY = ["bokeh", "dask", "distributed", "h5py", "matplotlib", "numpy", "pandas", "tqdm", "yaml", "zarr"]


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, as a dotted name; `from package import name` gives `package.name`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inner_imports(name: str) -> set[str]:
    """Modules of the package that one of them imports, by their dotted names."""
    found = set()
    for module in imports(MODULES[name]):
        package, *parts = module.split(".")
        if package == "pipeline":
            assert parts, f"{name}: the list of public names is for users"
            prefixes = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
            found |= prefixes & set(MODULES)
    return found - {name}


def test_every_folder_has_its_place():
    assert {name.partition(".")[0] for name in MODULES if "." in name} == set(FOLDERS)
    assert {name for name in MODULES if "." not in name} == set(GROUND)
    assert not {*FOLDERS, *GROUND} & set(pipeline.__all__)


def test_imports_point_downwards():
    below = {folder: {folder, *lower.split(), *GROUND} for folder, lower in FOLDERS.items()}
    upwards = [
        (name, module)
        for name in MODULES
        for module in inner_imports(name)
        if module.partition(".")[0] not in below.get(name.partition(".")[0], GROUND)
    ]
    assert upwards == []


def test_no_cycle():
    order = graphlib.TopologicalSorter({name: inner_imports(name) for name in MODULES}).static_order()
    assert set(order) == set(MODULES)


def test_other_packages_stay_in_their_modules():
    own = {"pipeline", "numpy", *sys.stdlib_module_names}
    strangers = [
        (name, package)
        for name, path in MODULES.items()
        for package in {module.split(".")[0] for module in imports(path)} - own
        if not {name, name.partition(".")[0]} & set(OUTSIDE.get(package, "").split())
    ]
    assert strangers == []


def loaded_by(code: str) -> list[str]:
    """Heavy packages in a new interpreter after `code`, which may end in SystemExit."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "code",
    [
        "import pipeline; pipeline.InputError, dir(pipeline)",
        "from pipeline.cli.main import main; sys.argv = ['pipeline', '--help']; main()",
        "from pipeline.cli.main import main; sys.argv = ['pipeline', 'run', '--help']; main()",
        "from pipeline.cli.main import main; sys.argv = ['pipeline', 'run', 'A.zarr', '--no-such-flag']; main()",
    ],
)
def test_help_and_wrong_flags_load_nothing_heavy(code):
    assert loaded_by(code) == []


def test_looking_at_a_matrix_loads_no_dask(samples):
    assert "zarr" in loaded_by(f"import pipeline; pipeline.open_matrix({str(samples / 'A.zarr')!r})")
    code = f"from pipeline.cli.main import main; sys.argv = ['pipeline', 'info', {str(samples / 'A.zarr')!r}]; main()"
    assert not {"dask", "distributed"} & set(loaded_by(code))


@pytest.mark.parametrize(("name", "zarr"), [("A.zarr", ["zarr"]), ("A.npy", [])])
def test_a_run_loads_what_it_needs_and_no_more(samples, tmp_path, name, zarr):
    """Bokeh alone would take as long as a small run."""
    line = ["pipeline", "run", str(samples / name), "--count", "1", "--out", str(tmp_path / "w.npy")]
    code = f"from pipeline.cli.main import main; sys.argv = {line!r}; main()"
    assert loaded_by(code) == ["dask", "distributed", "numpy", "yaml", *zarr]
    assert (tmp_path / "w.npy").exists()


def test_public_names():
    assert sorted(pipeline.__all__) == pipeline.__all__
    assert set(pipeline.__all__) == set(pipeline._HOMES)
    typed = {module.removeprefix("pipeline.") for module in imports(PACKAGE / "__init__.py") if "pipeline." in module}
    assert typed == {f"{home}.{name}" for name, home in pipeline._HOMES.items()}
    assert set(pipeline.__all__) <= set(dir(pipeline))


@pytest.mark.parametrize("name", pipeline.__all__)
def test_public_name_is_there_and_documented(name):
    value = getattr(pipeline, name)
    assert value is getattr(importlib.import_module(f"pipeline.{pipeline._HOMES[name]}"), name)
    assert value.__module__ == f"pipeline.{pipeline._HOMES[name]}"
    assert inspect.getdoc(value), name
    if inspect.isfunction(value):
        assert "Examples\n--------" in inspect.getdoc(value)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'gahter'"):
        _ = pipeline.gahter


def test_every_failure_has_its_exit_code_and_builtin():
    errors = importlib.import_module("pipeline.errors")
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert {kind.__name__ for kind in kinds} <= set(pipeline.__all__)
    for kind in kinds:
        assert issubclass(kind, pipeline.PipelineError)
        assert kind.exit_code in range(1, 8)
        if kind is not pipeline.PipelineError:
            assert any(base.__module__ == "builtins" and base is not Exception for base in kind.__mro__[1:-3]), kind
