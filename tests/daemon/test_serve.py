"""`ratoon serve` as a process: its sockets, its lock, its end. No machine runs."""

from __future__ import annotations

import json
import os
import signal
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from daemon_process import FOR_EVER, DaemonProcess, daemon, run_serve
from ratoon.store.snapshot.store import Store
from small_snapshots import publish

Place = tuple[Path, Path]


def make_place(directory: Path) -> Place:
    """A store with one snapshot, and a directory for its sockets."""
    publish(Store.open(directory / "home"), "base")
    return directory / "home", directory / "run"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """One for a daemon that a test starts itself."""
    return make_place(tmp_path)


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def running(shared_place: Place) -> Iterator[DaemonProcess]:
    """A daemon that the tests share."""
    with daemon(*shared_place) as running:
        yield running


def until(condition: Callable[[], bool]) -> None:
    """A line is written once the request has been answered."""
    deadline = time.monotonic() + FOR_EVER
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(place: Place, *arguments: str) -> tuple[int, str]:
    process = run_serve(*place, *arguments)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_the_socket_is_its_users_alone(running: DaemonProcess) -> None:
    mode = running.socket.stat()
    assert stat.S_ISSOCK(mode.st_mode)
    assert stat.S_IMODE(mode.st_mode) == 0o600
    assert stat.S_IMODE(running.socket.parent.stat().st_mode) == 0o700
    assert [each["tag"] for each in running.api.get("/v1/snapshots").json()] == ["base"]


def test_a_store_has_one_daemon(running: DaemonProcess, shared_place: Place) -> None:
    code, said = refused(shared_place)
    assert code == 4
    assert f"process {running.process.pid}" in said
    assert running.api.get("/healthz").status_code == 200


def test_two_stores_do_not_share_a_socket(running: DaemonProcess, shared_place: Place) -> None:
    code, said = refused((shared_place[0].with_name("other"), shared_place[1]))
    assert code == 4
    assert "RATOON_RUNTIME" in said
    assert running.api.get("/healthz").status_code == 200


def test_the_next_one_may_start_after_a_kill(place: Place) -> None:
    with daemon(*place) as first:
        first.stop(signal.SIGKILL)
        assert first.socket.exists()
        with daemon(*place) as second:
            assert second.stop(signal.SIGINT)[0] == 0


def test_it_listens_on_tcp_with_a_token(place: Place, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n")
    arguments = ("--bind", "127.0.0.1:0", "--token-file", str(tmp_path / "token"))
    with daemon(*place, *arguments) as running:
        url = f"{running.url}/v1/snapshots"
        assert httpx2.get(url).status_code == 401
        assert running.api.get("/v1/snapshots").status_code == 401
        headers = {"Authorization": "Bearer 0123456789abcdef"}
        assert httpx2.get(url, headers=headers).status_code == 200
        assert running.api.get("/v1/snapshots", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--bind", "0.0.0.0:0"), "--token-file"),
        (("--bind", "nonsense"), "HOST:PORT"),
        (("--token-file", "/dev/null"), "token"),
        (("--bind", "127.0.0.1:0", "--tls-cert", "/dev/null"), "--tls-key"),
        (("--branch-cap", "0"), "branch-cap"),
    ],
)
def test_what_it_cannot_be_started_with(
    place: Place, arguments: tuple[str, ...], said: str
) -> None:
    code, error = refused(place, *arguments)
    assert code == 2
    assert said in error
    assert not (place[1] / "daemon.sock").exists()


def test_tls(place: Place, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-keyout", key, "-out", certificate, "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    arguments = ("--bind", "127.0.0.1:0", "--tls-cert", str(certificate), "--tls-key", str(key))
    with daemon(*place, *arguments) as running:
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx2.get(f"{running.url}/healthz", verify=context).json() == {"ok": True}
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{running.url.replace('https', 'http')}/healthz")
        assert running.api.get("/healthz").json() == {"ok": True}


def test_the_end(place: Place) -> None:
    """Streams end, the socket goes, and all that was logged is JSON in each line."""
    begun, lines = threading.Event(), []
    with daemon(*place) as running:

        def follow() -> None:
            with running.api.stream("GET", "/v1/events") as answer:
                for line in answer.iter_lines():
                    begun.set()
                    lines.append(line)

        following = threading.Thread(target=follow)
        following.start()
        assert begun.wait(FOR_EVER)
        code, said = running.stop()
        following.join(FOR_EVER)
    assert not following.is_alive()
    assert set(lines) == {""}
    assert code == 0
    assert not running.socket.exists()
    logged = [json.loads(line) for line in (running.said + said).splitlines() if line[:1] == "{"]
    assert any("daemon.sock" in line["message"] for line in logged)
    assert {"at_unix", "level", "logger", "message"} <= set(logged[0])


def test_what_is_asked_is_written_down(running: DaemonProcess, shared_place: Place) -> None:
    path, secret = shared_place[0] / "audit.log", {"diff": True, "note": "secret"}

    def entries() -> list[dict[str, object]]:
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if "audited" in entry["what"]]

    running.api.get("/v1/snapshots/audited/info?query=secret")
    running.api.delete("/v1/snapshots/audited")
    running.api.post("/v1/workspaces/audited/suspend", json=secret)
    until(lambda: len(entries()) == 3)
    assert [(entry["what"], entry["status"]) for entry in entries()] == [
        ("GET /v1/snapshots/audited/info", 404),
        ("DELETE /v1/snapshots/audited", 404),
        ("POST /v1/workspaces/audited/suspend", 404),
    ]
    for entry in entries():
        assert entry["who"] == f"uid={os.geteuid()},pid:{os.getpid()}"
    assert "secret" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.rename(path.with_name("audit.log.1"))
    running.api.delete("/v1/snapshots/audited")
    until(lambda: len(entries()) == 1)


def test_metrics_count_requests_by_route(running: DaemonProcess) -> None:
    for name in ("one", "two"):
        running.api.get(f"/v1/snapshots/{name}/usage")
        running.api.get(f"/made-up/{name}")
    text = running.api.get("/metrics").text
    route = '{method="GET",route="/v1/snapshots/{tag}/usage",status="404"}'
    assert f"ratoon_http_requests_total{route} 2.0" in text
    assert "made-up" not in text
    assert "ratoon_snapshots 1.0" in text


def test_health_tells_of_a_store_that_cannot_be_written_to(
    running: DaemonProcess, shared_place: Place
) -> None:
    shared_place[0].rename(shared_place[0].with_name("elsewhere"))
    try:
        answer = running.api.get("/healthz")
    finally:
        shared_place[0].with_name("elsewhere").rename(shared_place[0])
    assert answer.status_code == 503
    assert "store" in answer.json()["error"]
    assert running.api.get("/healthz").json() == {"ok": True}
