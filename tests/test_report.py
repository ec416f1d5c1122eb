"""The limit that a run's report names."""

from __future__ import annotations

import pytest

from pipeline.report import Watch, name_limit


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
    assert name_limit(watch, threads=4, seconds=1.0, amplification=1.0)[0] == limit


def test_a_short_run_says_nothing():
    assert name_limit(Watch(read_seconds=0.3), threads=4, seconds=0.1, amplification=1.0) == ("unknown", "")


def test_wasted_reading_has_its_advice():
    assert "less" in name_limit(Watch(read_seconds=4), threads=4, seconds=1.0, amplification=9.0)[1]
