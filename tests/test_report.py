"""The limit that a run's report names."""

from __future__ import annotations

import pytest

from pipeline.report import Watch, name_limit, share_seconds


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ({"read_seconds": 3.6}, "storage"),
        ({"read_seconds": 1.0, "decode_seconds": 2.8}, "decode"),
        ({"read_seconds": 1.0, "apply_seconds": 2.8}, "apply"),
        ({"read_seconds": 0.5, "write_seconds": 3.0}, "write"),
        ({"read_seconds": 0.4}, "Dask"),
        ({"read_seconds": 1.5, "decode_seconds": 1.2, "write_seconds": 1.2}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_limit_is_what_took_most(seconds, limit):
    watch = Watch()
    for name, value in seconds.items():
        setattr(watch, name, value)
    assert name_limit(watch, threads=4, seconds=1.0, amplification=1.0, repetition=1.0)[0] == limit


def test_a_short_run_says_nothing():
    assert name_limit(Watch(read_seconds=0.3), threads=4, seconds=0.1, amplification=1.0, repetition=1.0) == (
        "unknown",
        "",
    )


def test_wasted_reading_has_its_advice():
    assert "less" in name_limit(Watch(read_seconds=4), threads=4, seconds=1.0, amplification=9.0, repetition=1.0)[1]


@pytest.mark.parametrize("stage", ["read", "decode"])
def test_chunks_that_are_read_again_have_theirs(stage):
    watch = Watch(**{f"{stage}_seconds": 4.0})
    settings = {"threads": 4, "seconds": 1.0, "amplification": 9.0}
    assert "--order chunk" in name_limit(watch, **settings, repetition=3.0)[1]
    assert "--order chunk" not in name_limit(watch, **settings, repetition=1.1)[1]


def test_shares_are_those_of_the_tasks_time():
    watch = Watch(read_seconds=1.0, decode_seconds=2.0, write_seconds=1.0)
    assert share_seconds(watch) == {"read": 0.25, "decode": 0.5, "apply": 0.0, "write": 0.25}
    assert set(share_seconds(Watch()).values()) == {0.0}
