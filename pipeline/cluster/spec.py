"""What a `cluster.yaml` may say: parsed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import dask
import msgspec
import yaml

from pipeline.cluster.implicit import check_content, check_owner
from pipeline.cluster.registry import check_keys, load_class, name_class
from pipeline.errors import InputError, NotFoundError, OpenError, PipelineError
from pipeline.storage.trust import read_document

if TYPE_CHECKING:
    import os
    from collections.abc import Collection

OPEN_SETTINGS = {"logging", "environ", "pre-spawn-environ", "resources", "default-task-durations"}
"""Dask's settings whose keys are the user's own."""

NO_FILE = "the default cluster"
"""What messages call the cluster that no file describes."""

_Count = Annotated[int, msgspec.Meta(ge=1)]


class Scale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fixed number of workers, under one of three names."""

    n: _Count | None = None
    workers: _Count | None = None
    jobs: _Count | None = None

    @property
    def number(self) -> int:
        """Of workers, or of jobs."""
        return self.n or self.workers or self.jobs or 0


class Adapt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As many workers as the work asks for."""

    maximum: _Count
    minimum: Annotated[int, msgspec.Meta(ge=0)] = 1


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a `cluster.yaml` beside Dask's own settings."""

    version: Literal[1]
    module: str | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    scale: Scale | None = None
    adapt: Adapt | None = None
    scheduler_address: str | None = msgspec.field(default=None, name="scheduler-address")
    scheduler_file: str | None = msgspec.field(default=None, name="scheduler-file")
    insecure: bool = False

    @property
    def describes_cluster(self) -> bool:
        """Whether any key says which cluster to start."""
        return any((self.module, self.class_, self.kwargs, self.scale, self.adapt))

    @property
    def workers(self) -> int | None:
        """Workers that the cluster scales to, at most; None where the file names no number."""
        if self.adapt:
            return self.adapt.maximum
        return None if self.scale is None else self.scale.number


def read_spec(cluster: str | os.PathLike[str] | None) -> tuple[Spec, dict[str, Any], str]:
    """Read a cluster file: its spec, Dask's settings, and its name for messages.

    Raises
    ------
    InputError, NotFoundError, OpenError
        As `connect` does.
    """
    if cluster is None and not Path("cluster.yaml").exists():
        return Spec(version=1), {}, NO_FILE
    path = Path("cluster.yaml" if cluster is None else cluster)
    if cluster is None:
        check_owner(path)
    fields = [field.encode_name for field in msgspec.structs.fields(Spec)]
    content: dict[Any, Any] = {}
    for key, value in _parse(path).items():
        if (name := _hyphened(key, fields)) in content:
            raise InputError(f"a key stands once; got {name!r} with a hyphen and an underscore in {path}; drop one")
        content[name] = value
    spec = _convert(content, path)
    settings = {key: value for key, value in content.items() if key not in fields}
    # Its package brings Dask settings of its own.
    load_class(*name_class(spec.module, spec.class_, str(path)))
    known = dask.config.config | {"logging": {}}
    check_keys(content, [*fields, *known], str(path))
    _check_settings(settings, known, str(path))
    if cluster is None:
        check_content(content, settings, path)
    return spec, settings, str(path)


def _hyphened(key: Any, fields: Collection[str]) -> Any:
    """Return a key as the fields spell it: Dask takes an underscore for a hyphen."""
    name = str(key).replace("_", "-")
    return name if name in fields else key


def _convert(content: dict[Any, Any], path: Path) -> Spec:
    fields = [field.encode_name for field in msgspec.structs.fields(Spec)]
    for key, struct in (("scale", Scale), ("adapt", Adapt)):
        if isinstance(content.get(key), dict):
            check_keys(content[key], struct.__struct_fields__, f"{key} in {path}")
    try:
        spec = msgspec.convert({key: value for key, value in content.items() if key in fields}, Spec)
    except msgspec.ValidationError as error:
        raise InputError(
            f"a cluster file has the keys and types of the cluster.yaml that comes with this package; got {path}: "
            f"{error}; correct it"
        ) from None
    scales = [] if spec.scale is None else [each for each in msgspec.structs.astuple(spec.scale) if each is not None]
    wrong = spec.scale is not None and (len(scales) != 1 or spec.adapt is not None)
    if spec.adapt is not None and spec.adapt.minimum == 0:
        raise InputError(
            "adapt keeps a worker at least, which a run asks what it can see and how many tasks it takes, before it "
            f"begins; got minimum: 0 in {path}; write minimum: 1"
        )
    if wrong or (spec.adapt is not None and spec.adapt.minimum > spec.adapt.maximum):
        raise InputError(
            f"a cluster scales by one number or between two; got {content.get('scale')!r} and "
            f"{content.get('adapt')!r} in {path}; write "
            "scale: {workers: 4}, or adapt: {minimum: 1, maximum: 4}"
        )
    return spec


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, of which YAML keeps the last in silence; 10:00:00 stays text."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Leave a number of base 60 as text: a batch system has a walltime in hours, minutes and seconds."""
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        sixties = kind is yaml.ScalarNode and tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        return self.DEFAULT_SCALAR_TAG if sixties and ":" in value else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice in one mapping, or that merges another into it."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.tag == "tag:yaml.org,2002:merge":
                raise _MergeKeyError(key.start_mark.line + 1)
            if key.value in seen:
                raise _DuplicateKeyError(key.value, key.start_mark.line + 1)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _DuplicateKeyError(Exception):
    """Key and line."""


class _MergeKeyError(Exception):
    """Line."""


def _parse(path: Path) -> dict[Any, Any]:
    try:
        text = read_document(path, follow=True).decode()
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.TagToken | yaml.AliasToken):
                line = token.start_mark.line + 1
                raise InputError(
                    f"a cluster file holds plain values; got a tag or an alias in {path}, line {line}; write it out"
                )
        content = yaml.load(text, Loader=_Loader)  # noqa: S506
    except _DuplicateKeyError as error:
        key, line = error.args
        raise InputError(
            f"a key stands once; got {key!r} twice in {path}, the second in line {line}; drop one"
        ) from None
    except _MergeKeyError as error:
        raise InputError(
            f"a cluster file holds plain values; got a key << in {path}, line {error.args[0]}; write it out"
        ) from None
    except FileNotFoundError:
        raise NotFoundError(f"the cluster file must exist; got {path}; correct its path, or leave it out") from None
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, PipelineError):
            raise
        raise OpenError(f"a cluster file is readable YAML; got {path}: {_fault(error)}; correct it") from None
    if not isinstance(content, dict):
        raise OpenError(
            f"a cluster file is a mapping of keys; got {type(content).__name__} in {path}; start from the "
            "cluster.yaml that comes with this package"
        )
    return content


def _fault(error: Exception) -> str:
    """Words of an error, without the text of the file, in which secrets may stand."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return f"{error.problem or error.context}" + ("" if mark is None else f", line {mark.line + 1}")
    if isinstance(error, yaml.reader.ReaderError):
        return f"{error.reason}, character {error.position}"
    return one_line(error)


def _check_settings(given: Mapping[Any, Any], known: Mapping[str, Any], where: str) -> None:
    """Compare Dask's settings with its defaults, level by level: Dask itself takes any key in silence."""
    for key, value in given.items():
        default = known[dask.config.canonical_name(key, known)]
        # An empty one takes the user's own keys.
        if not isinstance(default, Mapping) or not default:
            continue
        if not isinstance(value, Mapping):
            raise InputError(f"{key} in {where} is a mapping; got {value!r}; write {key}: {{setting: value}}")
        if key.replace("_", "-") not in OPEN_SETTINGS:
            check_keys(value, default, f"{key} in {where}")
            _check_settings(value, default, where)


def merged_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Top-level keys of Dask's config after `settings`: merged, since `dask.config.set` replaces whole subtrees."""
    chosen = _without(settings, dask.config.collect_env())
    merged: dict[str, Any] = dask.config.merge(dask.config.config, chosen)
    return {key: merged[key] for key in (dask.config.canonical_name(key, merged) for key in chosen)}


def _without(settings: Mapping[str, Any], winners: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` less the leaves that `winners` sets."""
    rest = {}
    for key, value in settings.items():
        name = dask.config.canonical_name(key, winners)
        if name not in winners:
            rest[key] = value
        elif isinstance(value, Mapping) and isinstance(winners[name], Mapping):
            rest[key] = _without(value, winners[name])
    return rest


def one_line(error: BaseException) -> str:
    """Words of an error, without line ends."""
    return " ".join((str(error) or type(error).__name__).split())


def key_lines(path: str | Path) -> dict[tuple[str, ...], int]:
    """Lines, from 1, at which the keys of a cluster file stand; a key below others is named with them."""
    found: dict[tuple[str, ...], int] = {}

    def visit(node: yaml.Node, above: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = (*above, str(key.value).replace("_", "-"))
                found[name] = key.start_mark.line + 1
                visit(value, name)

    root = yaml.compose(read_document(Path(path), follow=True).decode(), Loader=yaml.SafeLoader)
    if root is not None:
        visit(root, ())
    return found
