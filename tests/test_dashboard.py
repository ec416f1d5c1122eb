"""What the dashboard shows of a run, and where it is found."""

from __future__ import annotations

import itertools
import pickle
import re
import socket
import time
from types import SimpleNamespace
from urllib.request import urlopen

import dask
import distributed
import numpy as np
import pytest
from distributed.deploy import Cluster

import pipeline
from pipeline.cluster import dashboard
from pipeline.cluster.connect import connect
from pipeline.cluster.dashboard import Address, dashboard_link, locate_dashboard, say_dashboard
from pipeline.runtime import runner as runs
from pipeline.runtime.tasks import name_tasks

HERE = socket.gethostname()
DISTANT = "192.0.2.77"
"""An address of a net for documentation, which no machine has."""
JUPYTER = "{JUPYTERHUB_SERVICE_PREFIX}proxy/{port}/status"


@pytest.fixture
def plan(samples):
    matrix = pipeline.open_matrix(samples / "A.zarr")
    starts = pipeline.draw_starts(matrix.rows, length=16, count=300, seed=0)
    return pipeline.plan_windows(matrix, starts, length=16)


@pytest.fixture
def elsewhere():
    """Client of a scheduler that it only knows by its address, 127.0.0.2, whose dashboard is on 127.0.0.1 alone."""
    with (
        distributed.LocalCluster(
            n_workers=1,
            processes=False,
            protocol="tcp",
            host="127.0.0.2",
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
        ) as cluster,
        distributed.Client(cluster.scheduler_address, set_as_default=False) as client,
    ):
        yield client, cluster.scheduler.http_server.port


class TestAddress:
    def test_one_that_is_here_needs_no_tunnel(self):
        with connect() as client:
            port = client.cluster.scheduler.http_server.port
            assert locate_dashboard(client) == (f"http://127.0.0.1:{port}/status", None)
            assert say_dashboard(client) == [f"dashboard: http://127.0.0.1:{port}/status"]

    @pytest.mark.parametrize(
        ("variables", "way"),
        [
            ({"SSH_CONNECTION": "198.51.100.7 50000 127.0.0.2 22"}, HERE),
            ({"SSH_CONNECTION": f"198.51.100.7 50000 {DISTANT} 22"}, f"-J {DISTANT} {HERE}"),
            ({"SLURM_SUBMIT_HOST": "login"}, f"-J login {HERE}"),
            ({"SLURM_SUBMIT_HOST": f"{HERE}.example.org"}, HERE),
            ({"PBS_O_HOST": "login", "SSH_CONNECTION": "cut off"}, f"-J login {HERE}"),
        ],
    )
    def test_from_another_machine_there_is_a_tunnel(self, capfd, monkeypatch, tmp_path, variables, way):
        monkeypatch.chdir(tmp_path)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with connect() as client:
            port = client.cluster.scheduler.http_server.port
            link, tunnel = capfd.readouterr().err.splitlines()
        assert link == f"dashboard: http://127.0.0.1:{port}/status"
        assert tunnel == f"from your own machine: ssh -L {port}:127.0.0.1:{port} {way}"

    def test_an_address_of_this_machine_is_its_own_name_to_the_user(self, monkeypatch):
        """The one that the session came in by, where it is none of the loopback."""
        monkeypatch.setenv("SSH_CONNECTION", f"198.51.100.7 50000 {DISTANT} 22")
        monkeypatch.setattr(dashboard, "_is_ours", lambda host: True)
        assert dashboard._way_here() == [DISTANT]

    @pytest.mark.parametrize(
        ("prefix", "link"), [("/user/ann/", "/user/ann/proxy/{port}/status"), (None, "http://127.0.0.1:{port}/status")]
    )
    def test_the_users_own_link_is_kept(self, elsewhere, monkeypatch, prefix, link):
        """It may be one that only a browser can follow; without a variable that it names, the plain one is left."""
        monkeypatch.setenv("SSH_CONNECTION", f"198.51.100.7 50000 {DISTANT} 22")
        monkeypatch.delenv("JUPYTERHUB_SERVICE_PREFIX", raising=False)
        if prefix:
            monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", prefix)
        client, port = elsewhere
        with dask.config.set({"distributed.dashboard.link": JUPYTER}):
            with connect() as mine:
                taken = mine.cluster.scheduler.http_server.port
                assert locate_dashboard(mine) == (link.format(port=taken), None)
            if prefix:
                assert locate_dashboard(client) == (link.format(port=port), None)

    def test_loopback_of_this_machine_behind_another_address_of_it(self, elsewhere):
        client, port = elsewhere
        assert client.dashboard_link == f"http://127.0.0.2:{port}/status"
        assert locate_dashboard(client) == (f"http://127.0.0.1:{port}/status", None)

    def test_loopback_of_another_machine(self, elsewhere, monkeypatch):
        client, port = elsewhere
        monkeypatch.setattr(dashboard, "_is_ours", lambda host: host == "192.0.2.1")
        link = f"http://127.0.0.1:{port}/status"
        assert locate_dashboard(client) == (link, f"ssh -L {port}:127.0.0.1:{port} 127.0.0.2")
        monkeypatch.setenv("SSH_CONNECTION", "198.51.100.7 50000 192.0.2.1 22")
        assert locate_dashboard(client) == (link, f"ssh -L {port}:127.0.0.1:{port} -J 192.0.2.1 127.0.0.2")

    def test_one_that_is_reached_from_here_alone(self, elsewhere, monkeypatch):
        """The tunnel ends here, and goes on to the machine that serves it."""
        client, port = elsewhere
        monkeypatch.setattr(dashboard, "_answers", lambda host, port: True)
        assert locate_dashboard(client) == (f"http://127.0.0.2:{port}/status", None)
        monkeypatch.setenv("SSH_CONNECTION", "198.51.100.7 50000 127.0.0.3 22")
        assert locate_dashboard(client).tunnel == f"ssh -L {port}:127.0.0.2:{port} {HERE}"

    @pytest.mark.parametrize(
        ("link", "found"), [("https://gate/proxy/7", Address("https://gate/proxy/7", None)), (None, None)]
    )
    def test_a_cluster_that_knows_its_own_link(self, link, found):
        class Gateway(Cluster):
            dashboard_link = link

            def __init__(self):
                pass

            def __del__(self):
                pass

        assert locate_dashboard(SimpleNamespace(cluster=Gateway())) == found

    def test_addresses_of_the_newer_kind_stand_in_brackets(self):
        assert dashboard._describe("::1", 8787, ["login"]) == (
            "http://[::1]:8787/status",
            "ssh -L 8787:[::1]:8787 login",
        )


def hrefs(shown):
    """Links of what is shown in a notebook."""
    return {each for each in re.findall(r'href="([^"]*)"', shown._repr_html_()) if each}


class TestLinksOfDask:
    """Client and cluster, and what a notebook shows of them, link to where something listens."""

    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"n_workers": 2, "processes": True, "threads_per_worker": 1},
            {"dashboard_address": "0.0.0.0:0", "insecure": True},
            {"n_workers": 0, "adapt": True},
        ],
        ids=["threads", "processes", "everywhere", "scaled later"],
    )
    def test_they_answer(self, kwargs, tmp_path):
        if kwargs.pop("adapt", None):
            kwargs["cluster"] = tmp_path / "adapt.yaml"
            kwargs["cluster"].write_text("version: 1\nkwargs: {n_workers: 0}\nscale: {workers: 2}\n")
            del kwargs["n_workers"]
        with connect(**kwargs) as client:
            link = dashboard_link(client)
            assert (client.dashboard_link, client.cluster.dashboard_link) == (link, link)
            workers = len(client.scheduler_info(n_workers=-1)["workers"])
            for shown in (client, client.cluster):
                found = hrefs(shown)
                assert link in found
                assert len(found) == 1 + workers
                for each in found:
                    with urlopen(each) as response:
                        assert b"Dask" in response.read()
        assert type(dask.config.get("distributed.dashboard.link")) is str

    def test_without_a_dashboard_there_is_none(self):
        with connect(dashboard_address=None) as client:
            port = client.cluster.scheduler.http_server.port
            assert (dashboard_link(client), client.dashboard_link, client.cluster.dashboard_link) == (None, "", "")
            assert f":{port}/" not in client._repr_html_() + client.cluster._repr_html_()

    def test_a_scheduler_that_runs_already(self, elsewhere):
        """Its address is not that of its dashboard; other clients are shown as before."""
        foreign, port = elsewhere
        wrong, right = (f"http://127.0.0.{number}:{port}/status" for number in (2, 1))
        with connect(scheduler_address=foreign.scheduler.address) as client:
            assert (client.dashboard_link, dashboard_link(client)) == (right, right)
            assert right in hrefs(client)
            with urlopen(client.dashboard_link) as response:
                assert response.status == 200
            with connect() as inner:
                assert client.dashboard_link == right
                assert inner.dashboard_link == dashboard_link(inner)
                assert str(port) not in inner.dashboard_link
        assert foreign.dashboard_link == wrong

    def test_the_users_own_link(self, monkeypatch):
        monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ann/")
        with dask.config.set({"distributed.dashboard.link": JUPYTER}), connect() as client:
            port = client.cluster.scheduler.http_server.port
            assert client.dashboard_link == client.cluster.dashboard_link == f"/user/ann/proxy/{port}/status"

    def test_settings_that_travel_are_plain(self):
        with connect():
            setting = dask.config.get("distributed.dashboard.link")
            assert type(pickle.loads(pickle.dumps(setting))) is str


class TestRows:
    def test_one_row_for_each_stage(self, plan, samples, tmp_path):
        with connect(dashboard_address=None) as client:
            scheduler = client.cluster.scheduler
            pipeline.gather(plan)
            pipeline.store(plan, tmp_path / "w.zarr")
            pipeline.create_matrix(samples / "A.npy", tmp_path / "A.zarr")
            assert pipeline.verify(tmp_path / "A.zarr") == []
            dask.compute(*pipeline.build_tasks(plan))
            assert set(scheduler.task_prefixes) == {"read", "write", "create", "verify", "windows"}

    def test_keys_tell_stage_and_number(self):
        tasks = [task.key for task in name_tasks("read", divmod, [(7, 2), (8, 2)])]
        (stage, run), (again, _) = (key[0].split("-") for key in tasks)
        assert (stage, again, [number for _, number in tasks]) == ("read", "read", [0, 1])
        assert len(run) == 8

    def test_a_run_is_a_span_below_the_callers_own(self, plan, tmp_path):
        with connect(dashboard_address=None) as client:
            scheduler = client.cluster.scheduler
            pipeline.gather(plan)
            with distributed.span("week 3"):
                pipeline.store(plan, tmp_path / "w.zarr")
            done = {span.name: sum(map(len, span.groups)) for span in scheduler.extensions["spans"].spans.values()}
            assert ("pipeline", "gather", "array") in done
            assert ("week 3", "pipeline", "store", "w.zarr") in done
            # And nothing beside them.
            assert {name[:2] for name in done if "default" not in name} <= {
                ("pipeline",),
                ("pipeline", "gather"),
                ("week 3",),
                ("week 3", "pipeline"),
            }

    def test_fine_metrics_know_the_stages(self, plan, tmp_path):
        with connect(dashboard_address=None) as client:
            pipeline.store(plan, tmp_path / "w.zarr")
            deadline = time.monotonic() + 20
            wanted = {("execute", "write", stage, "seconds") for stage in ("read", "write")}
            # They come with the next heartbeat.
            while not wanted <= set(client.cluster.scheduler.cumulative_worker_metrics):
                assert time.monotonic() < deadline
                time.sleep(0.02)


class TestLaziness:
    """A task is made when its turn comes, and let go of when it is done."""

    def test_tasks_without_end(self):
        made = itertools.count()
        with connect(dashboard_address=None):
            results = runs.run_tasks(name_tasks("read", divmod, ((number, 7) for number in made)), at_once=4)
            got = [next(results) for _ in range(40)]
            results.close()
        assert len(set(got)) == 40
        assert 40 <= next(made) <= runs._MOST_SUBMITTED + 40

    def test_blocks_that_travel_are_bounded(self):
        made = itertools.count()
        with connect(dashboard_address=None):
            tasks = name_tasks("read", divmod, ((number, 7) for number in made))
            results = runs.run_tasks(tasks, at_once=4, results_travel=True)
            for taken in range(20):
                next(results)
                # One may be asked for before the result of another was taken.
                assert next(made) <= taken + 5 + taken + 1
            results.close()

    def test_the_scheduler_forgets(self, monkeypatch):
        monkeypatch.setattr(runs, "_MOST_HELD", 10)
        monkeypatch.setattr(runs, "_MOST_SUBMITTED", 20)
        most = 0
        with connect(dashboard_address=None) as client:
            known = client.cluster.scheduler.tasks
            for _ in runs.run_tasks(name_tasks("read", divmod, ((number, 7) for number in range(300))), at_once=4):
                most = max(most, len(known))
        assert 20 <= most <= 20 + 10 + 20  # A release takes its time.

    def test_small_runs_are_shown_as_a_whole(self):
        with connect(dashboard_address=None) as client:
            tasks = name_tasks("read", divmod, ((number, 7) for number in range(100)))
            for done, _ in enumerate(runs.run_tasks(tasks, at_once=4), start=1):
                if done == 100:
                    states = client.cluster.scheduler.task_prefixes["read"].states
                    assert (states["memory"], states["forgotten"]) == (100, 0)

    def test_no_tasks(self):
        with connect(dashboard_address=None):
            assert list(runs.run_tasks(iter(()), at_once=4)) == []


def test_planned_windows_fit_in_memory(samples, monkeypatch):
    matrix = pipeline.open_matrix(samples / "A.zarr")
    monkeypatch.setattr("pipeline.plan.plan._PLANNED_NBYTES", 10**12)
    with pytest.raises(
        pipeline.BudgetError, match=r"that of 1,000 windows takes .*; plan and run them in parts"
    ) as caught:
        pipeline.plan_windows(matrix, np.zeros(1000, int), length=16)
    assert caught.value.exit_code == 5


def test_the_link_is_that_of_the_address():
    with connect(dashboard_address=None) as client:
        assert dashboard_link(client) is None
        assert say_dashboard(client) == []
