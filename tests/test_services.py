"""The services that other tests use are what they say they are."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from datetime import timedelta

import distributed
import obstore
import pytest
from obstore.store import S3Store

from tests import services


@pytest.mark.s3
class TestS3:
    @pytest.fixture
    def store(self, bucket):
        def store(**settings):
            return S3Store.from_url(bucket.url, **settings)

        return store

    def test_requests_and_bytes_are_counted(self, bucket, store):
        objects = store()
        obstore.put(objects, "a/b", bytes(range(200)))
        assert bytes(obstore.get_range(objects, "a/b", start=10, length=20)) == bytes(range(10, 30))
        (put,) = bucket.proxy.fitting("PUT")
        assert (put.key, put.sent, put.status) == (f"/{bucket.url.removeprefix('s3://')}/a/b", 200, 200)
        (get,) = bucket.proxy.fitting("GET")
        assert (get.range, get.nbytes, get.status) == ("bytes=10-29", 20, 206)
        assert bucket.proxy.nbytes() == 20 + bucket.proxy.nbytes("PUT")
        assert [each["path"] for batch in obstore.list(objects) for each in batch] == ["a/b"]
        assert obstore.head(objects, "a/b")["size"] == 200
        with pytest.raises(obstore.exceptions.AlreadyExistsError):
            obstore.put(objects, "a/b", b"", mode="create")
        bucket.proxy.reset()
        assert bucket.proxy.count() == 0

    def test_troubles_strike_on_schedule(self, bucket, store):
        retrying = store(retry_config={"max_retries": 3, "backoff": {"init_backoff": timedelta(milliseconds=1)}})
        obstore.put(retrying, "x", b"x" * 100)
        for kind in ("error", "drop"):
            bucket.proxy.reset()
            trouble = bucket.proxy.trouble(kind, method="GET", key="/x$", skip=1, times=2)
            assert [bytes(obstore.get(retrying, "x").bytes()) for _ in range(2)] == [b"x" * 100] * 2
            assert (trouble.met, trouble.done) == (4, 2)
            status = 500 if kind == "error" else 0
            assert [each.status for each in bucket.proxy.fitting("GET")] == [200, status, status, 200]

    def test_bodies_that_end_early_and_answers_that_never_come(self, bucket, store):
        once = store(retry_config={"max_retries": 0})
        obstore.put(once, "x", b"x" * 100)
        bucket.proxy.trouble("cut", method="GET")
        with pytest.raises(Exception, match=r"(?i)body"):
            obstore.get(once, "x").bytes()
        bucket.proxy.trouble("corrupt", method="GET", amount=3)
        assert bytes(obstore.get(once, "x").bytes()) == b"xxx" + bytes([ord("x") ^ 0xFF]) + b"x" * 96
        bucket.proxy.trouble("stall", method="GET")
        begin = time.monotonic()
        # Options of the client take the place of those in the environment.
        options = {"timeout": timedelta(milliseconds=300), "allow_http": True}
        hurried = store(retry_config={"max_retries": 0}, client_options=options)
        with pytest.raises(obstore.exceptions.BaseError):
            obstore.get(hurried, "x").bytes()
        assert 0.2 < time.monotonic() - begin < 5

    def test_a_lost_answer_is_of_a_request_that_was_carried_out(self, bucket, store):
        once = store(retry_config={"max_retries": 0})
        bucket.proxy.trouble("lose", method="PUT")
        with pytest.raises(Exception, match="PUT|put|send|connection"):
            obstore.put(once, "x", b"here")
        assert bytes(obstore.get(once, "x").bytes()) == b"here"

    def test_latency_and_what_is_under_way_at_once(self, bucket, store):
        objects = store()
        obstore.put(objects, "x", b"here")
        bucket.proxy.reset()
        bucket.proxy.latency = 0.2
        threads = [threading.Thread(target=lambda: obstore.get(objects, "x").bytes()) for _ in range(4)]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 0.2 < time.monotonic() - begin < 0.75
        assert bucket.proxy.peak == 4


class TestEnd:
    """What a service started ends with it, also when a test fails."""

    @pytest.mark.ssh
    def test_ssh(self, tmp_path):
        if reason := services.absent_ssh():
            pytest.skip(reason)
        with contextlib.suppress(ZeroDivisionError), services.ssh_server(tmp_path) as server:
            for host in server.hosts:
                script = "setsid sleep 1000 >/dev/null 2>&1 & echo $SSH_CONNECTION"
                command = ["ssh", "-n", "-F", server.config, host, script]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                assert done.stdout.split()[2] == host
            assert len(services.left_over(tmp_path)) == len(server.hosts)
            raise ZeroDivisionError
        assert services.left_over(tmp_path) == []

    @pytest.mark.slurm
    def test_slurm(self, tmp_path, monkeypatch):
        if reason := services.absent_slurm():
            pytest.skip(reason)
        with contextlib.suppress(ZeroDivisionError), services.slurm_nodes(tmp_path) as variables:
            monkeypatch.setenv("SLURM_CONF", variables["SLURM_CONF"])
            (tmp_path / "job").write_text(f"#!/bin/sh\necho $SLURMD_NODENAME > {tmp_path}/where\nsleep 1000\n")
            subprocess.run(["sbatch", "--output=/dev/null", tmp_path / "job"], check=True, capture_output=True)
            services.wait_for((tmp_path / "where").exists, "the job", log=tmp_path / "slurmctld.log")
            raise ZeroDivisionError
        assert services.left_over(tmp_path) == []

    @pytest.mark.tls
    def test_tls(self, tls_service):
        """It speaks no plain TCP; without a certificate it is silent."""
        address = json.loads(tls_service.read_text())["scheduler-address"]
        assert address.startswith("tls://127.0.0.1:")
        for wrong in (address.replace("tls://", "tcp://"), address):
            with pytest.raises((OSError, TypeError)):
                distributed.Client(wrong, timeout=1, set_as_default=False)

    def test_a_program_that_does_not_end_is_killed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(services, "_END_SECONDS", 0.2)
        with (
            services.swept(tmp_path),
            services.running(tmp_path, "stubborn", "sh", "-c", "trap '' TERM; sleep 1000 & wait; wait") as process,
        ):
            services.wait_for(lambda: len(services.left_over(tmp_path)) == 2, "its child")
        assert process.returncode == -9
        assert services.left_over(tmp_path) == []
        assert os.getpid() not in services.left_over(tmp_path)
