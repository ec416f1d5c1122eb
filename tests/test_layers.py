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
SOURCES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"} | {"bench": PACKAGE / "bench"}
"""A file, or the folder of a package, by its name."""

LAYERS = [
    "__main__",
    "cli",
    "bench",
    "demo options request settings wording",
    "batches",
    "collect readahead writeback create recording verification",
    "performance placing progress ranges targets",
    "outputs",
    "publication",
    "report runs shards",
    "flights",
    "failures workers",
    "losses",
    "capacity dataset",
    "tasks",
    "readers sampler sights staging stamps uploads",
    "ranged",
    "pieces",
    "decoding",
    "groupplan",
    "plan selection",
    "plots",
    "matrices",
    "matrix starts cluster",
    "choice columns",
    "jobs local services ssh",
    "clusterfile gate launch nannies startup",
    "dashboard",
    "implicit",
    "deployments secrecy security",
    "counting sources decoders encoding epochs",
    "attributes inspection intervals",
    "storage",
    "arrays hdf5 layout ledger",
    "bounding filters",
    "buckets references netcdf",
    "keys",
    "chunks",
    "fetching identity journal manifest notice npy stores",
    "folderstore holding sharing",
    "bounded conventions credentials files locations markup memory preads record rowfiles",
    "arguments trust",
    "filesystem",
    "errors exits forking formats pages signals sizes zarrconfig",
    "redaction",
]
"""From the top of the flow to its bottom: a module imports those of lower lines only."""

OUTSIDE = {
    "bokeh": "",
    "botocore": "credentials",
    "click": "cli options pages",
    "cloudpickle": "identity request tasks",
    "asyncssh": "ssh",
    "cryptography": "security",
    "dask": "bench capacity choice cluster clusterfile dashboard failures flights gate jobs local progress runs security services settings ssh tasks",
    "distributed": "bench capacity cluster dashboard failures flights forking gate jobs launch local nannies security ssh startup tasks workers",
    "fsspec": "locations",
    "google_crc32c": "chunks decoders encoding inspection record verification",
    "h5py": "bench filters hdf5 references",
    "hdf5plugin": "filters",
    "matplotlib": "bench groupplan plan plots report",
    "msgspec": "clusterfile journal ledger manifest notice record settings trust",
    "numcodecs": "bench bounded bounding filters",
    "obstore": "buckets keys storage stores",
    "tensorstore": "bench",
    "torch": "bench",
    "tornado": "dashboard gate local",
    "tqdm": "progress",
    "yaml": "clusterfile",
    "zarr": "arrays attributes bench bounding buckets counting create dataset decoders decoding fetching folderstore inspection keys layout matrices matrix outputs publication ranged readers recording settings shards sights sources stamps storage stores targets uploads verification writeback zarrconfig",
}
"""Modules that may import what is heavy or has a home of its own; NumPy and the standard library are for all."""

HEAVY = ["bokeh", "dask", "distributed", "h5py", "matplotlib", "numpy", "pandas", "tqdm", "yaml", "zarr"]


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, as a dotted name; `from package import name` gives `package.name`."""
    found = set()
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inner_imports(name: str) -> set[str]:
    """Names of the modules of the package that one of them imports."""
    dotted = [module.split(".") for module in imports(SOURCES[name])]
    assert ["pipeline"] not in dotted, f"{name}: the list of public names is for users"
    return {parts[1] for parts in dotted if parts[0] == "pipeline"} - {name}


def test_every_module_has_its_layer():
    assert sorted(" ".join(LAYERS).split()) == sorted(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_downwards(name):
    mine = next(number for number, layer in enumerate(LAYERS) if name in layer.split())
    below = set(" ".join(LAYERS[mine + 1 :]).split())
    assert inner_imports(name) <= below


def test_no_cycle():
    order = graphlib.TopologicalSorter({name: inner_imports(name) for name in SOURCES}).static_order()
    assert set(order) == set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_other_packages_stay_in_their_modules(name):
    used = {module.split(".")[0] for module in imports(SOURCES[name])}
    own = {"pipeline", "numpy", *sys.stdlib_module_names}
    assert {package for package in used - own if name not in OUTSIDE[package].split()} == set()


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
