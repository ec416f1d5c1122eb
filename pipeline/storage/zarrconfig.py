"""Zarr under settings of our own: what is read and written depends on none that a user, or a worker's machine, has.

Zarr asks one configuration for the whole process, again and again while it works. To set it and set it back would
change what other threads do meanwhile, and two that do so at once may leave it changed for good. So Zarr's
configuration object answers by context here: a context variable reaches Zarr's event loop, and what that hands to
threads.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_pinned: ContextVar[bool] = ContextVar("pinned", default=False)
_PINNED: dict[str, Any] = {
    # Works in the calling thread; about 1.7 times as fast here as Zarr's default. More threads would be out of context.
    "codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline",
    "codec_pipeline.max_workers": 1,
    # Chunks of several sizes can be read.
    "array.rectilinear_chunks": True,
}
"""Where our settings are not Zarr's defaults."""
_SPEED = ("async.concurrency", "threading.max_workers")
"""Settings that decide how fast Zarr is, and nothing else: the user's, where they make sense."""
FUSED_PIPELINE: str = _PINNED["codec_pipeline.path"]


@contextmanager
def pinned_config() -> Iterator[None]:
    """Let Zarr work under our settings in this block, and in what it starts there; other threads keep the user's."""
    _install()
    token = _pinned.set(True)
    try:
        yield
    finally:
        _pinned.reset(token)


def user_setting(name: str) -> int | None:
    """Value of a setting of speed that the user has given; None where it is Zarr's own, or makes no sense."""
    import zarr

    _install()
    given = super(type(zarr.config), zarr.config).get(name, None)
    sound = isinstance(given, int) and not isinstance(given, bool) and given > 0
    return given if sound and given != _look_up(zarr.config.defaults[0], name) else None


@cache
def _install() -> None:
    """Let Zarr's configuration object answer with our settings, within `pinned_config`."""
    import zarr

    own = deepcopy(zarr.config.defaults[0])
    for name, value in _PINNED.items():
        section, _, field = name.partition(".")
        own[section][field] = value
    kind: Any = type(zarr.config)

    class PinnedConfig(kind):  # type: ignore[misc]
        def get(self, key: str, *given: Any, **named: Any) -> Any:
            if not _pinned.get():
                return super().get(key, *given, **named)
            if key in _SPEED:
                return user_setting(key) or _look_up(own, key)
            if key == "codecs":
                # Those that Zarr does not know are the user's.
                return {**super().get(key, {}), **own[key]}
            try:
                return _look_up(own, key)
            except (KeyError, TypeError):
                return super().get(key, *given, **named)

    zarr.config.__class__ = PinnedConfig


def _look_up(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    return value
