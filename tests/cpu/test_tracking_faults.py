"""Real servers: MLflow killed, with a full disk, lost answers, a password; PostgreSQL."""

import os
import re
import signal
import sys
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, UNAUTHENTICATED
from support import fake_trials, stores

from jepa_cluster.errors import TrackingError
from jepa_cluster.tracking import mlflow_client, sync
from jepa_cluster.trial.directory import Root, TrialDir


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stores.Server]:
    """One server over SQLite. Each test has trials of its own seed and leaves it running."""
    folder = tmp_path_factory.mktemp("server")
    with stores.Server(folder, f"sqlite:///{folder}/mlflow.db") as started:
        yield started


def assert_every_point_once(database: str, trials: list[TrialDir]) -> None:
    found = fake_trials.stored(database)
    for trial in trials:
        wanted = fake_trials.spooled(trial)
        assert wanted, trial.name
        once = {key: [value] for key, value in wanted.items()}
        assert found.get(trial.name, {}) == once, trial.name
    assert fake_trials.doubled_runs(database) == []


@contextmanager
def following(root: Root, uri: str) -> Iterator[list[str]]:
    """A running collector and the lines that it logs."""
    stop = threading.Event()
    logged = list[str]()
    thread = threading.Thread(target=sync.follow, args=(root, uri, 0.1, stop, logged.append))
    thread.start()
    try:
        yield logged
    finally:
        stop.set()
        thread.join(120)


def advance(trials: list[TrialDir], stop: int) -> None:
    for trial in trials:
        fake_trials.run(trial, stop=stop, cause="done" if stop == 60 else "preempted")


def shipped(server: stores.Server, trials: list[TrialDir], step: int) -> bool:
    found = fake_trials.stored(server.backend)
    return all(("loss", step) in found.get(trial.name, {}) for trial in trials)


def count(logged: list[str], words: str) -> int:
    """Return the number of lines that contain these words."""
    return sum(words in line for line in logged)


def test_a_server_killed_under_load_costs_no_point_and_is_logged_once(
    server: stores.Server, tmp_path: Path
):
    """After kill -9 the collector logs the error, waits, and continues when the server is back."""
    trials = fake_trials.sweep(Root(tmp_path), "killed", seeds=(1,))
    with following(Root(tmp_path), server.uri) as logged:
        advance(trials, 20)
        stores.until(lambda: fake_trials.stored(server.backend), "nothing arrives")
        server.kill()
        advance(trials, 40)
        stores.until(
            lambda: count(logged, "connection refused"),
            "the collector does not notice",
        )
        server.start().ready()
        advance(trials, 60)
        stores.until(lambda: shipped(server, trials, 60), "the collector does not come back")
        stores.until(lambda: count(logged, "6 done"), "states do not arrive")
    assert count(logged, "connection refused") <= 2, logged
    assert_every_point_once(server.backend, trials)


def test_forty_writers_at_once_do_not_lock_one_another_out(server: stores.Server):
    """MLflow's sessions nest: with its default of 15 connections all would wait for another one."""
    client, _ = mlflow_client.connect(Root(server.folder), server.uri)
    experiment = client.create_experiment("crowd", str(server.folder / "crowd"))
    go = threading.Barrier(40)
    found = list[str]()

    def write(step: int) -> None:
        go.wait()
        run = client.create_run(experiment).info.run_id
        client.log_batch(run, metrics=[Metric("loss", 1.0, 0, step)])
        found.append(run)

    writers = [threading.Thread(target=write, args=(step,)) for step in range(40)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert len(found) == 40, "refused or still waiting; MLflow gives up on a connection after 30 s"


def test_answers_that_are_lost_double_neither_points_nor_runs(
    server: stores.Server, tmp_path: Path
):
    """A proxy drops a third of the answers, those to new runs included, after the server acted."""
    trials = fake_trials.sweep(Root(tmp_path), "lossy", seeds=(2,))
    query = """
        select r.status from runs r join experiments e on e.experiment_id = r.experiment_id
        where e.name = 'lossy' and r.lifecycle_stage = 'active'
    """
    with stores.lossy(server.port, 0.3) as (address, counts), following(Root(tmp_path), address):
        for stop in (20, 40, 60):
            advance(trials, stop)
            stores.until(lambda stop=stop: shipped(server, trials, stop), "points do not arrive")
        stores.until(
            lambda: fake_trials.rows(server.backend, query) == [("FINISHED",)] * 7,
            "states do not arrive",
        )
    assert counts["swallowed"] >= 5, counts
    assert_every_point_once(server.backend, trials)


def test_a_full_disk_under_the_server_is_waited_out(server: stores.Server, tmp_path: Path):
    """The kernel refuses writes of the database: one clear error, no loss once there is room."""
    root = Root(tmp_path)
    trials = fake_trials.sweep(root, "full", seeds=(3,))
    advance(trials, 20)
    assert sync.sync(root, uri=server.uri).points > 0
    advance(trials, 60)
    server.disk(free=8192)
    with pytest.raises(TrackingError, match="its disk is full") as e:
        sync.sync(root, uri=server.uri)
    assert "nothing is lost" in str(e.value)
    server.disk(free=None)
    assert sync.sync(root, uri=server.uri).states == {"done": 6}
    assert_every_point_once(server.backend, trials)


def test_postgresql_holds_the_same_and_a_rebuild_makes_it_equal(tmp_path: Path):
    """Every point once, the second sync sends nothing, --rebuild gives the same points."""
    if stores.postgres_programs() is None:
        reason = "needs, as root: apt-get install --no-install-recommends postgresql"
        if os.environ.get("JEPA_REQUIRE_POSTGRES"):
            pytest.fail(reason)
        pytest.skip(reason)
    root = Root(tmp_path)
    trials = fake_trials.sweep(root, seeds=(4,))
    advance(trials[:3], 60)
    advance(trials[3:], 40)
    with stores.postgres() as database:
        first = sync.sync(root, uri=database)
        second = sync.sync(root, uri=database)
        assert first.created == 7
        assert first.states == {"done": 3, "interrupted": 3}
        assert second.created == 0
        assert second.points == 0
        assert_every_point_once(database, trials)
        points = fake_trials.stored(database)
        assert sync.sync(root, uri=database, rebuild=True).created == 7
        assert fake_trials.stored(database) == points


INI = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/auth.db
admin_username = admin
admin_password = a-long-password-1
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def server_with_password(tmp_path: Path, database: str) -> stores.Server:
    """Return a server whose users log in, as `mlflow server --app-name jepa-auth` starts it."""
    (tmp_path / "auth.ini").write_text(INI.format(folder=tmp_path))
    command = [sys.executable, "-W", "ignore", "-m", "mlflow", "server"]
    command += ["--app-name", "jepa-auth", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", "{port}", "--backend-store-uri", database]
    return stores.Server(
        tmp_path,
        database,
        command,
        MLFLOW_AUTH_CONFIG_PATH=str(tmp_path / "auth.ini"),
        MLFLOW_FLASK_SERVER_SECRET_KEY="x" * 32,
        MLFLOW_DISABLE_TELEMETRY="true",
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    )


ANSWERS_TO_A_USER = {
    "/scaling/": 200,
    "/scaling/app.js": 200,
    "/scaling/plotly.min.js": 200,
    "/scaling/..%2fapp.py": 404,
    "/api/2.0/mlflow/experiments/get?experiment_id=0": 200,
}


def test_the_reason_of_a_refusal_is_its_status_code_and_not_a_number_in_its_text():
    port = OSError("database disk image of run 4031 at port 24013 is malformed")
    assert mlflow_client.short_reason(port) == str(port)
    refused = MlflowException("no", error_code=PERMISSION_DENIED)
    assert "refuses this user" in mlflow_client.short_reason(refused)
    unknown = MlflowException("API request failed with error code 401", error_code=UNAUTHENTICATED)
    assert "wants a user and password" in mlflow_client.short_reason(unknown)


def test_a_server_with_a_password_answers_401_and_takes_mlflows_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without a password nothing is served; with MLflow's variables the collector works."""
    database = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow_client.create_database(tmp_path / "mlflow.db")
    locked = server_with_password(tmp_path, database)
    root = Root(tmp_path / "root")
    trials = fake_trials.sweep(root, models=("vit_a",), scales=fake_trials.SCALES[:1], seeds=(5,))
    advance(trials, 60)
    with locked:
        for path, answer in ANSWERS_TO_A_USER.items():
            assert status(locked.uri + path) == 401, path
            assert status(locked.uri + path, "admin:a-long-password-1") == answer, path
        with pytest.raises(TrackingError, match="wants a user and password"):
            sync.sync(root, uri=locked.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password-1")
        assert sync.sync(root, uri=locked.uri).states == {"done": 1}
        assert_every_point_once(database, trials)
        locked.kill(signal.SIGTERM)


def status(url: str, user: str = "") -> int:
    request = urllib.request.Request(url)
    if user:
        credentials = b64encode(user.encode()).decode()
        request.add_header("Authorization", f"Basic {credentials}")
    try:
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as e:
        return e.code


def test_jepa_ui_leaves_no_process_behind(tmp_path: Path):
    """TERM ends server, collector and all they started; the last line is 'stopped'.

    Before that it answers only with the token that it prints.
    """
    command = [sys.executable, "-m", "jepa_cluster", "ui", "--port", "{port}"]
    ui = stores.Server(tmp_path, "", command, JEPA_ROOT=str(tmp_path))
    trials = fake_trials.sweep(Root(tmp_path), models=("vit_a",), seeds=(6,))
    fake_trials.run(trials[0])
    log = tmp_path / "server.log"
    with ui:
        stores.until(lambda: "ready: " in log.read_text(), "not ready")
        stores.until(lambda: "points sent" in log.read_text(), "nothing sent")
        assert status(f"{ui.uri}/scaling/") == status(f"{ui.uri}/?token=x") == 401
        (page,) = re.findall(r"scaling: +(\S+)", log.read_text())
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert browser.open(page, timeout=60).status == 200
        session = ui.process.pid
        assert session in processes_of(session)
        ui.process.send_signal(signal.SIGTERM)
        assert ui.process.wait(60) == 0
    assert processes_of(session) == set()
    assert log.read_text().endswith("stopped\n")
    lines = r"ready: \S+\n  scaling: +\S+/scaling/\?token=\S{32}\n  after [\d.]+ s"
    assert re.search(lines, log.read_text())


def processes_of(session: int) -> set[int]:
    """Return the living processes of a session."""
    found = set[int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found
