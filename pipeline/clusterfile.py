"""What a `cluster.yaml` may say: parsed and checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import dask
import msgspec
import yaml

from pipeline.errors import InputError, NotFoundError, OpenError, PipelineError

if TYPE_CHECKING:
    from collections.abc import Collection

_OPEN_SETTINGS = {"logging", "environ", "pre-spawn-environ", "resources", "default-task-durations"}
"""Dask's settings whose keys are the user's own."""

_Count = Annotated[int, msgspec.Meta(ge=1)]


class Scale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fixed number of workers, under one of three names."""

    n: _Count | None = None
    workers: _Count | None = None
    jobs: _Count | None = None


class Adapt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As many workers as the work asks for."""

    maximum: _Count
    minimum: Annotated[int, msgspec.Meta(ge=0)] = 0


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a `cluster.yaml` beside Dask's own settings."""

    version: Literal[1]
    module: str | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    scale: Scale | None = None
    adapt: Adapt | None = None
    scheduler_address: str | None = msgspec.field(default=None, name="scheduler-address")

    @property
    def describes_cluster(self) -> bool:
        """Whether any key says which cluster to start."""
        return any((self.module, self.class_, self.kwargs, self.scale, self.adapt))

    @property
    def workers(self) -> int:
        """Workers that the cluster scales to; 1 where the file names no number."""
        if self.adapt:
            return self.adapt.maximum
        numbers: list[int | None] = [*msgspec.structs.astuple(self.scale or Scale(n=1))]
        return max(filter(None, numbers))


def read_spec(cluster: str | Path | None) -> tuple[Spec, dict[str, Any], str]:
    """Read a cluster file: its spec, Dask's settings, and its name for messages."""
    if cluster is None and not Path("cluster.yaml").exists():
        return Spec(version=1), {}, "the default cluster"
    path = Path("cluster.yaml" if cluster is None else cluster)
    content = _parse(path)
    fields = [field.encode_name for field in msgspec.structs.fields(Spec)]
    known = dask.config.config | {"logging": {}}
    check_keys(content, [*fields, *known], str(path))
    settings = {key: value for key, value in content.items() if key not in fields}
    _check_settings(settings, known, str(path))
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
    if wrong or (spec.adapt is not None and spec.adapt.minimum > spec.adapt.maximum):
        raise InputError(
            f"a cluster scales by one number or between two; got {content.get('scale')!r} and "
            f"{content.get('adapt')!r} in {path}; write "
            "scale: {workers: 4}, or adapt: {minimum: 1, maximum: 4}"
        )
    return spec, settings, str(path)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, of which YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice in one mapping."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise _DuplicateKeyError(key.value, key.start_mark.line + 1)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _DuplicateKeyError(Exception):
    """Key and line."""


def _parse(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
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
    except FileNotFoundError:
        raise NotFoundError(f"the cluster file must exist; got {path}; correct its path, or leave it out") from None
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, PipelineError):
            raise
        raise OpenError(f"a cluster file is readable YAML; got {path}: {one_line(error)}; correct it") from None
    if not isinstance(content, dict):
        raise OpenError(
            f"a cluster file is a mapping of keys; got {type(content).__name__} in {path}; start from the "
            "cluster.yaml that comes with this package"
        )
    return content


def check_keys(given: Collection[Any], known: Collection[str], where: str) -> None:
    """Raise InputError, with the nearest known key, for a key that is not known."""
    for key in given:
        if str(key).replace("_", "-") not in {name.replace("_", "-") for name in known}:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise InputError(f"keys must be known; got {key!r} in {where}; did you mean {nearest!r}?")


def _check_settings(given: Mapping[Any, Any], known: Mapping[str, Any], where: str) -> None:
    """Compare Dask's settings with its defaults, level by level: Dask itself takes any key in silence."""
    for key, value in given.items():
        default = known[dask.config.canonical_name(key, known)]
        if not isinstance(default, Mapping):
            continue
        if not isinstance(value, Mapping):
            raise InputError(f"{key} in {where} is a mapping; got {value!r}; write {key}: {{setting: value}}")
        if key.replace("_", "-") not in _OPEN_SETTINGS:
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
