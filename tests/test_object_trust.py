"""What others put beside an output on an object store: parsed strictly, and nothing is deleted for it elsewhere."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

import pipeline
from pipeline.matrix.notice import read_notice
from pipeline.outputs.ledger import Claim, Ledger
from pipeline.storage import buckets, stores
from pipeline.storage.buckets import open_bucket
from pipeline.storage.checksums import FileRecord
from pipeline.storage.locations import locate

DEEP = "[" * 100_000 + "]" * 100_000
MAKING = "0123abcd"
numbers = itertools.count()


@pytest.fixture
def base():
    return f"memory://trust-{next(numbers)}"


@pytest.fixture
def bucket(base):
    made = open_bucket(locate(f"{base}/x").parent)
    for key in ("dear", "out.zarr.partial-not/a", "other.zarr/zarr.json"):
        made.put(key, b"dear")
    return made


@pytest.fixture
def plan(tmp_path):
    np.save(tmp_path / "A.npy", np.arange(800.0).reshape(80, 10))
    return pipeline.plan_windows(pipeline.open_matrix(tmp_path / "A.npy"), [3, 1, 2], length=4)


def objects(bucket):
    return sorted(bucket.list_keys(""))


def claim(**changes: Any) -> str:
    document = json.loads(Claim({"kind": "windows"}, 1, staged=False, making=MAKING).encode()) | changes
    return json.dumps(document)


CLAIMS = {
    "upwards": claim(making="../../x"),
    "line break": claim(making=f"{MAKING}\n"),
    "escape": claim(making="\x1b[2J\x1b[2J"),
    "array upwards": claim(arrays=["../windows"]),
    "array of numbers": claim(arrays=[1]),
    "number as run": claim(run=5),
    "infinite": claim(cut=float("inf")),
    "not a number": claim(cut=float("nan")),
    "huge": claim(cut=2**70),
    "nothing": claim(cut=0),
    "text": claim(cut="1"),
    "truth": claim(cut=True),
    "nested facts": claim(facts={"a": ["b"]}),
    "list of facts": claim(facts=["a"]),
    "nested holder": claim(holder={"a": {"b": 1}}),
    "staged": claim(staged="yes"),
    "more": claim(more=1),
    "version": claim(version=2),
    "deep": f'{{"facts": {DEEP}}}',
    "deep alone": DEEP,
    "list": "[]",
    "binary": "\x00\xff",
}


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}])
@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_that_nobody_wrote_so_is_none(base, bucket, plan, name, flags):
    bucket.put("out.zarr.partial/request.json", CLAIMS[name].encode("latin-1"))
    before = objects(bucket)
    with pytest.raises(pipeline.OutputExistsError, match=r"request\.json is no claim of this program") as caught:
        pipeline.store(plan, f"{base}/out.zarr", **flags)
    assert str(caught.value).isprintable()
    assert objects(bucket) == before


def test_whom_a_claim_names_is_printed_plainly():
    found = Claim.parse(claim(holder={"host": "\x1b]0;gotcha\x07", "since\n": "a\nb" * 1000}).encode())
    assert found is not None
    assert found.who.isprintable()
    assert len(found.who) <= 200


ENTRIES = [
    f'{{"files": {DEEP}}}',
    '{"files": [["../../dear", 4, 1, ""]]}',
    '{"files": [["/dear", 4, 1, ""]]}',
    '{"files": [["c/\\n0", 4, 1, ""]]}',
    '{"files": [["c/0", Infinity, 1, ""]]}',
    '{"files": [["c/0", -4, 1, ""]]}',
    '{"files": [["c/0", 4, 1, null]]}',
    '{"files": [["c/0", "4", 1, ""]]}',
    '{"files": [["c/0", 4, 1]]}',
    '{"files": {"c/0": 1}}',
    "[]",
    "",
]


@pytest.mark.parametrize("entry", ENTRIES, ids=range(len(ENTRIES)))
def test_a_mark_that_nobody_wrote_so_is_none(bucket, entry):
    ledger = Ledger(bucket, "out.zarr.partial/")
    bucket.put(f"out.zarr.partial/done-{MAKING}/0.json", b'{"files": [["c/0", 4, 5, "tag"]]}')
    bucket.put(f"out.zarr.partial/done-{MAKING}/1.json", entry.encode())
    assert ledger.finished(MAKING) == {0: (FileRecord("c/0", 4, 5, "tag"),)}


@pytest.mark.parametrize(
    "name", ["01.json", "-1.json", "1_0.json", "1\n.json", "1.json.bak", "a/1.json", f"{9**30}.json"]
)
def test_marks_of_other_names_are_none(bucket, name):
    ledger = Ledger(bucket, "out.zarr.partial/")
    bucket.put(f"out.zarr.partial/done-{MAKING}/{name}", b'{"files": []}')
    assert ledger.finished(MAKING) == {}
    assert ledger.count(MAKING) == 0


@pytest.mark.parametrize(
    "making", ["../../x", "", "0123abcd\n", "\x1b[2Jabcd", "0123ABCD", "0123abcd/..", None, 5, ["0"]]
)
def test_a_notice_names_what_we_made_alone(base, bucket, plan, making):
    attributes = {"random-windows": {"replaced by": making}}
    document = json.dumps({"zarr_format": 3, "node_type": "replacement", "attributes": attributes}).encode()
    assert read_notice(document) == ""
    bucket.put("out.zarr/zarr.json", document)
    before = objects(bucket)
    with pytest.raises(pipeline.OutputExistsError) as caught:
        pipeline.store(plan, f"{base}/out.zarr", overwrite=True)
    assert str(caught.value).isprintable()
    assert objects(bucket) == before


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        f'{{"attributes": {DEEP}}}',
        "[]",
        '{"node_type": "replacement", "attributes": {"random-windows": 1}}',
        f'{{"node_type": "group", "attributes": {{"random-windows": {{"replaced by": "{MAKING}"}}}}}}',
        "\x00",
    ],
)
def test_what_is_no_notice(text):
    assert read_notice(text.encode()) == ""


@pytest.fixture
def served(monkeypatch):
    """A bucket of a server, which is in memory."""
    from obstore.store import MemoryStore

    store = MemoryStore()
    monkeypatch.setattr(stores, "_connect", lambda *_, **__: store)
    return open_bucket(locate("s3://bucket/x").parent)


def test_documents_on_a_server_are_bounded(served, monkeypatch):
    served.put("out.zarr.partial/request.json", b"0123456789a")
    monkeypatch.setattr(buckets, "_DOCUMENT_NBYTES", 10)
    with pytest.raises(pipeline.OpenError, match=r"request\.json has 11 bytes, too many for a document"):
        Ledger(served, "out.zarr.partial/").read()


def test_keys_that_a_server_tells_without_being_asked_are_left_alone(served, monkeypatch):
    ledger, mine = Ledger(served, "out.zarr.partial/"), Claim({}, 1, staged=True, making=MAKING)
    ledger.take(mine, None)
    keys = ["request.json", "dear", f"done-{MAKING}/0.json", "out.zarr/zarr.json"]
    for key in keys:
        served.put(key, b"dear")
    real = buckets.list_told

    async def tell(store, _):
        async for each in real(store, ""):
            yield each

    monkeypatch.setattr(buckets, "list_told", tell)
    ledger.sweep(mine.run)
    ledger.forget(MAKING)
    assert [found is not None for found in served.get([*keys, "out.zarr.partial/request.json"])] == [True] * 4 + [False]


@pytest.mark.parametrize(
    "ours",
    [
        {"tags": ["a"]},
        {"tags": {"a": 1}},
        {"files": {"c/0": [1, "zz"]}},
        {"files": {"c/0": [-1, "00000000"]}},
        {"files": {"c/0": [float("inf"), "00000000"]}},
        {"files": {"c/0": [1, "0" * 100]}},
        {"files": {"c/0": [1]}},
        {"files": {"c/0": {"a": 1}}},
    ],
)
def test_a_record_that_nobody_wrote_so_is_one_line(base, bucket, plan, ours):
    pipeline.store(plan, f"{base}/out.zarr")
    [found] = bucket.get(["out.zarr/zarr.json"])
    document = json.loads(found[0])
    document["attributes"]["random-windows"].update(ours)
    bucket.put("out.zarr/zarr.json", json.dumps(document).encode())
    before = objects(bucket)
    for flags in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(pipeline.OutputExistsError) as caught:
            pipeline.store(plan, f"{base}/out.zarr", **flags)
        assert str(caught.value).isprintable()
    with pytest.raises(pipeline.OpenError, match="the record in .* lacks sizes or checksums"):
        pipeline.verify(f"{base}/out.zarr")
    assert objects(bucket) == before
