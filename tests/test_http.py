"""The HTTP interface of a running service, and its page."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from programs import shell, write_program
from service import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from programs import Programs
    from service import Answer, Service

pytestmark = pytest.mark.slow


def test_each_route_answers_as_the_contract_says(start: Callable[..., Service], programs: Programs) -> None:
    """The fields are those that people and scripts rely on."""
    service = start()
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    pid = service.process.pid
    assert service.get("/version") == {"version": "1.0.0"}
    assert service.get("/healthz") == {"status": "ok", "version": "1.0.0", "pid": pid, "generation": 0}
    status = service.get("/status")
    assert list(status) == [
        "version",
        "pid",
        "generation",
        "phase",
        "bind",
        "started_at",
        "installed",
        "upgrade",
        "trust",
    ]
    assert (status["phase"], status["bind"], status["upgrade"]) == ("RUNNING", f"localhost:{service.address[1]}", None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", status["started_at"])
    listing = service.get("/candidates")
    assert (listing["current"], listing["latest"]) == ("1.0.0", "new")
    (candidate,) = listing["candidates"]
    assert list(candidate) == ["name", "version", "sha256", "signer", "eligible", "reason", "code", "remedy"]
    assert re.fullmatch("[0-9a-f]{64}", candidate["sha256"])
    assert service.get("/upgrades") == {"upgrades": []}
    for path in ("/nothing", "/upgrades/nothing", "/replace", "/upgrades/../status"):
        answer = service.ask("GET", path)
        assert (answer.status, answer.headers["Content-Type"]) == (404, "application/problem+json")
        assert list(answer.json) == ["type", "title", "status", "detail"]


def test_an_upgrade_is_accepted_and_can_be_followed(start: Callable[..., Service], programs: Programs) -> None:
    """202 with the record and its place; the new version knows it, too, and the whole history."""
    service = start("-probation", "300ms", "-drain", "5s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    answer = service.ask("POST", "/upgrade")
    assert answer.status == 202
    record = answer.json
    assert answer.headers["Location"] == f"/upgrades/{record['id']}"
    assert (record["from"], record["outcome"]) == ("1.0.0", None)
    service.status_when(lambda status: status["version"] == "1.1.0" and status["phase"] == "RUNNING")
    ended = service.get(f"/upgrades/{record['id']}")
    assert (ended["to"], ended["name"], ended["outcome"], ended["reason"]) == ("1.1.0", "new", "committed", None)
    phases = ["CHOOSING", "STAGING", "STARTING", "PROBING", "REPLACING", "PROBATION", "RETIRED"]
    assert [entry["phase"] for entry in ended["timeline"]] == phases
    (service.upgrade_dir / "newer").symlink_to(programs.version("1.2.0"))
    second = service.upgrade()
    assert [record["id"] for record in service.get("/upgrades")["upgrades"]] == [second["id"], record["id"]]
    answer = service.ask("POST", "/upgrade")
    assert (answer.status, answer.json["outcome"]) == (200, "up-to-date")


def test_what_was_never_begun_is_in_no_history(start: Callable[..., Service], programs: Programs) -> None:
    """There was nothing to go back to, and no such candidate: the next version knows as little of it as this one."""
    service = start("-probation", "100ms", "-drain", "5s")
    assert service.ask("POST", "/rollback").status == 409
    assert service.ask("POST", "/upgrade", {"name": "nothing"}).status == 404
    assert service.get("/upgrades") == {"upgrades": []}
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    record = service.upgrade()
    service.status_when(lambda status: status["version"] == "1.1.0" and status["phase"] == "RUNNING")
    assert [known["id"] for known in service.get("/upgrades")["upgrades"]] == [record["id"]]


def test_of_many_simultaneous_requests_one_is_accepted(start: Callable[..., Service], programs: Programs) -> None:
    """50 at once: one 202, and 49 times 409 with its id and its place."""
    service = start("-probation", "3s", "-drain", "5s")  # all of them have asked by then
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    address = service.address
    barrier = threading.Barrier(50)
    answers: list[Answer] = []

    def ask() -> None:
        barrier.wait()
        answers.append(service.ask("POST", "/upgrade", address=address))

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(answer.status for answer in answers) == {202: 1, 409: 49}, [
        answer.json for answer in answers if answer.status != 409
    ]
    (accepted,) = (answer.json["id"] for answer in answers if answer.status == 202)
    for answer in answers:
        assert answer.json["id"] == accepted
        assert answer.headers["Location"] == f"/upgrades/{accepted}"
    assert service.record_when(accepted, lambda record: record["outcome"] is not None)["outcome"] == "committed"


@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        ("/upgrade", "not JSON", 400, "The body is not JSON"),
        ("/upgrade", '["name"]', 400, 'The body must be {"name": "…"} with the name of a candidate, or nothing.'),
        ("/upgrade", '{"nmae": "new"}', 400, "The body must be"),
        ("/upgrade", '{"name": 1}', 400, "The body must be"),
        ("/upgrade", "[" * 4000, 400, "The body is not JSON"),
        ("/upgrade", '{"name": "' + "x" * 2000 + '"}', 400, "A candidate's name has at most 1024 characters."),
        ("/upgrade?wait=soon", "", 400, "wait takes a duration such as 500ms, 30s or 2m."),
        ("/upgrade", '{"name": "../../bin/sh"}', 404, "../../bin/sh is not in "),
        ("/upgrade", '{"name": "old"}', 422, "old cannot be upgraded to: 0.9.0 is older than 1.0.0, which runs."),
    ],
)
def test_a_bad_request_for_an_upgrade(
    start: Callable[..., Service], path: str, body: str, status: int, detail: str
) -> None:
    """It is refused with what is wrong, and nothing is left under way."""
    service = start()
    shell(service.upgrade_dir / "old", "0.9.0", "")
    with socket.create_connection(service.address, PATIENCE) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        client.sendall((head + body).encode())
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"].startswith(detail)
    assert service.get("/status")["phase"] == "RUNNING"
    recorded = [record["outcome"] for record in service.get("/upgrades")["upgrades"]]
    assert recorded == (["aborted"] if status == 422 else []), "only what could be examined is recorded"


def test_a_wait_of_any_length_has_the_same_bound(start: Callable[..., Service], programs: Programs) -> None:
    """What is longer than a day is waited for no longer than anything else: the time to drain."""
    service = start("-probation", "1m", "-drain", "100ms")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    answer = service.ask("POST", "/upgrade?wait=1000h")
    assert (answer.status, answer.json["outcome"]) == (202, None)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/upgrade", {}, 405),
        ("POST", "/status", {}, 405),
        ("PUT", "/upgrade", {}, 405),
        ("HEAD", "/status", {}, 200),
        ("POST", "/upgrade", {"Origin": "http://evil.example"}, 403),
        ("POST", "/upgrade", {"Origin": "null"}, 403),
        ("POST", "/upgrade", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", "/upgrade", {"Sec-Fetch-Site": "same-site"}, 403),
        ("POST", "/upgrade", {"Sec-Fetch-Site": "same-origin"}, 200),
        ("POST", "/upgrade", {"Host": "evil.example"}, 421),
        ("GET", "/status", {"Host": "evil.example:8080"}, 421),
        ("GET", "/status", {"Host": ""}, 421),
        ("GET", "/status", {"Host": "127.0.0.1:1"}, 200),
        ("GET", "/status", {"Host": "[::1]:1"}, 200),
        ("GET", "/status", {"Host": "[localhost]:1"}, 421),
        ("GET", "/status", {"Host": "LOCALHOST:1"}, 200),
        ("GET", "/status", {"Host": "known.example"}, 200),
    ],
)
def test_who_may_ask_what(
    start: Callable[..., Service], method: str, path: str, headers: dict[str, str], status: int
) -> None:
    """Other sites' pages change nothing, and a name that resolves to the service does not make it another's."""
    service = start("-allowed-hosts", "known.example,other.example")
    assert service.ask(method, path, headers=headers).status == status


def test_the_page(start: Callable[..., Service], tmp_path: Path, tool: Callable[[str], str]) -> None:
    """It loads nothing from elsewhere, runs no script but its own, and makes no HTML of what programs say."""
    service = start()
    page, style, *scripts = (service.ask("GET", path) for path in ("/", "/style.css", "/app.js", "/view.js"))
    kinds = ["text/html", "text/css", "text/javascript", "text/javascript"]
    assert [answer.headers["Content-Type"] for answer in (page, style, *scripts)] == [
        f"{kind}; charset=utf-8" for kind in kinds
    ]
    for answer in (page, style, *scripts):
        assert answer.status == 200
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    for answer in (style, *scripts):
        assert re.findall(rb"https?://|url\(|@import", answer.body) == []
    assert set(re.findall(rb'(?:src|href)="(.)', page.body)) == {b"/"}
    assert re.findall(rb" on[a-z]+=|<style|style=", page.body) == []
    for script in scripts:
        makes_html = rb"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|setTimeout\(['\"]|[sS]etHTML"
        assert re.findall(makes_html, script.body) == []
        (tmp_path / "script.mjs").write_bytes(script.body)
        subprocess.run([tool("node"), "--check", tmp_path / "script.mjs"], check=True)
        used = set(re.findall(r'at\("([a-z-]+)"\)', script.body.decode()))
        assert used
        assert used <= set(re.findall(r'id="([a-z-]+)"', page.body.decode()))


def test_log_lines_are_json_and_survive_hostile_words(start: Callable[..., Service]) -> None:
    """One object a line, with who wrote it, whatever a program says; a file's odd name never gets that far."""
    service = start()
    shell(service.upgrade_dir / "a\nb\x1b[31m", "3.0.0", "")
    shell(service.upgrade_dir / "bad", "2.0.0", "exit 3")
    record = service.upgrade()
    assert record["outcome"] == "aborted"
    write_program(service.upgrade_dir / "bad", b"#!/bin/sh\nprintf 'a\\nb\\033[31m' >&2; exit 1\n")
    refused = service.ask("POST", "/upgrade", {"name": "bad"})
    assert (refused.status, refused.json["code"]) == (422, "version-exit")
    assert "b\\x1b[31m" in refused.json["detail"]
    service.stop()
    reasons = [line["reason"] for line in service.lines if line.get("outcome") == "aborted"]
    assert reasons == [record["reason"], refused.json["detail"]]
    for line in service.lines:
        assert {"at", "level", "message", "version", "pid", "generation"} <= line.keys(), line
    assert [line["message"] for line in service.lines][-1] == "stopped"


def test_dev_writes_logs_for_people(start: Callable[..., Service]) -> None:
    """A line is a text, which says who wrote it: version, generation and process."""
    service = start("-dev")
    line = service.next_line()["message"]
    at, who = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", r"1\.0\.0 #0 \[\d+\]"
    assert re.fullmatch(rf"{at} INFO    {who} serving bind=localhost:\d+", line)


def test_a_unix_socket_serves_and_is_handed_over(
    start: Callable[..., Service], programs: Programs, tmp_path: Path
) -> None:
    """The path stays, and one version after another answers on it."""
    path = tmp_path / "s"
    service = start("-bind", f"unix:{path}", "-probation", "100ms", "-drain", "5s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    assert service.places == [str(path)]
    assert service.get("/version") == {"version": "1.0.0"}
    assert service.upgrade()["outcome"] == "committed"
    assert service.get("/version") == {"version": "1.1.0"}
    service.stop()
    assert not path.exists()
