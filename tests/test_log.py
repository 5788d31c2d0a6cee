"""The log lines: their fields, the ids that join them across processes, and what people see of them."""

from __future__ import annotations

import ast
import contextvars
import io
import logging
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from programs import shell
from service import PATIENCE

from selfupdate import listener as listeners
from selfupdate import log
from selfupdate.listener import Address
from selfupdate.messages import Request, Response
from selfupdate.relay import relay
from selfupdate.server import Server
from selfupdate.settings import Limits
from selfupdate.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from programs import Programs
    from service import Service

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = {"at", "level", "message", "version", "pid", "generation"}
BY_CONTEXT = {"request", "upgrade", "exception"}
HOSTILE = "a\x1b[2J\x9b31m\u202eb\nc"
"""Escape codes of either kind, a mark that turns text around, and a line feed."""


def _used() -> set[str]:
    """Return the name of each field that a line is given anywhere in the source."""
    found: set[str] = set()
    for path in (ROOT / "selfupdate").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            dicts = {
                target.id: node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            extras = [
                keyword.value
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                for keyword in node.keywords
                if keyword.arg == "extra"
            ]
            for extra in extras:
                found |= _keys(extra, dicts)
    return found


def _keys(value: ast.expr, dicts: dict[str, ast.Dict]) -> set[str]:
    """Return the keys of a dict that is written out, there or where its name is assigned; fail at any other."""
    value = dicts[value.id] if isinstance(value, ast.Name) else value
    assert isinstance(value, ast.Dict), ast.dump(value)
    found: set[str] = set()
    for key, inner in zip(value.keys, value.values, strict=True):
        assert key is None or isinstance(key, ast.Constant), ast.dump(key)
        found |= _keys(inner, dicts) if key is None else {str(key.value)}
    return found


def _documented() -> list[str]:
    """Return what README's section on logs has in the first column of its table."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Logs\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([a-z_]+)`", row)]


def test_the_readme_lists_each_field() -> None:
    """All that a line can have, once, and nothing else."""
    used = _used()
    assert {"reason", "phase", "outcome", "seconds", "directory"} <= used, "the search finds those that are there"
    assert sorted(_documented()) == sorted(ALWAYS | BY_CONTEXT | used)


# What people see.


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., io.StringIO]]:
    """Configure logs as a service does, on a stream to look at, which is a terminal if asked for."""
    handlers, level = logging.root.handlers[:], logging.root.level

    def configure(environ: dict[str, str], *, dev: bool, is_terminal: bool) -> io.StringIO:
        stream = _Stream(is_terminal=is_terminal)
        monkeypatch.setattr("sys.stderr", stream)
        log.configure(environ, dev=dev, generation=3)
        return stream

    yield configure
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


class _Stream(io.StringIO):
    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def fileno(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("environ", "is_terminal", "has_colours"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": ""}, True, False),
        ({}, True, False),
        ({"TERM": "xterm"}, False, False),
    ],
)
def test_lines_for_people_are_coloured_on_a_terminal_alone(
    lines: Callable[..., io.StringIO], environ: dict[str, str], *, is_terminal: bool, has_colours: bool
) -> None:
    """Not where TERM says that it knows none, nor where NO_COLOR has a text; without, the lines are the same."""
    stream = lines(environ, dev=True, is_terminal=is_terminal)
    nobody = contextvars.Context()  # no test before this one has left the id of a request there
    nobody.run(logging.getLogger("x").warning, "said", extra={"reason": "two words"})
    text = stream.getvalue()
    assert ("\x1b" in text) == has_colours
    plain = re.sub(r"\x1b\[[0-9]+m", "", text)
    assert re.fullmatch(r'[-0-9]{10} [:.0-9]{12} WARNING \S+ #3 \[\d+\] said reason="two words"\n', plain)


@pytest.mark.parametrize("dev", [True, False])
def test_what_comes_from_elsewhere_is_escaped(lines: Callable[..., io.StringIO], *, dev: bool) -> None:
    """In a message, in a field, and in an exception: a line is one line, and moves no cursor."""
    stream = lines({"TERM": "dumb"}, dev=dev, is_terminal=True)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("x").exception("%s", HOSTILE, extra={"reason": HOSTILE})
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    assert stream.getvalue() == f"{line}\n"


def test_each_kind_of_terminal_is_told_apart() -> None:
    """A pseudo-terminal tells how wide it is; a pipe and a file are none, and 80 columns wide."""
    master, slave = os.openpty()
    with os.fdopen(master, "wb"), os.fdopen(slave, "w", encoding="utf-8") as stream:
        found = Terminal.of(stream, {"TERM": "xterm"})
        assert (found.has_reader, found.redraws, found.has_colours, found.columns) == (True, True, True, 80)
        found = Terminal.of(stream, {"TERM": "dumb"})
        assert (found.has_reader, found.redraws, found.has_colours) == (True, False, False)
    with Path(os.devnull).open("w", encoding="utf-8") as stream:
        found = Terminal.of(stream, {"TERM": "xterm"})
        assert (found.has_reader, found.redraws, found.has_colours, found.columns) == (False, False, False, 80)


# One request, one id.


@pytest.fixture
def place() -> Iterator[Address]:
    """Serve an application that answers with the status that its path names, and the id of the request."""

    def answer(request: Request) -> Response:
        if request.path == "/defect":
            raise OSError("a defect")
        return Response(int(request.path[1:]), log.request_id().encode())

    server = Server("log", answer, Limits())
    listener = listeners.bind(Address("localhost", 0))
    address = Address("localhost", listener.getsockname()[1])
    server.accept(listener)
    yield address
    server.close(0)


def _ask(address: Address, request: bytes) -> tuple[str, str]:
    """Return the id in the head of an answer, and its body."""
    with socket.create_connection((address.host, address.port), PATIENCE) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as stream:
            head, _, body = stream.read().partition(b"\r\n\r\n")
    ids = re.findall(rb"(?m)^X-Request-Id: (.*)\r?$", head)
    assert len(ids) == 1, head
    return ids[0].decode().rstrip("\r"), body.decode()


@pytest.mark.parametrize("given", ["1", "a-b/c=d", "~" * 128])
def test_a_well_formed_id_is_taken(place: Address, given: str) -> None:
    """From a header in any case, and given back."""
    request = f"GET /200 HTTP/1.1\r\nHost: localhost\r\nx-REQUEST-id:\t {given} \r\nConnection: close\r\n\r\n"
    assert _ask(place, request.encode()) == (given, given)


@pytest.mark.parametrize("given", ["", "a b", "~" * 129, "\u00e4", "a\tb", "\x7f"])
def test_any_other_id_is_replaced(place: Address, given: str) -> None:
    """By one that is made, another for each request."""
    request = f"GET /200 HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {given}\r\nConnection: close\r\n\r\n"
    made = {_ask(place, request.encode("latin-1"))[0] for _ in range(3)}
    assert len(made) == 3
    assert all(re.fullmatch("[0-9a-f]{12}", one) for one in made)


@pytest.mark.parametrize(
    "request_line",
    [
        "GET /200 HTTP/9.9",
        "nonsense",
        "GET relative HTTP/1.1",
        "GET /" + "x" * 4000 + " HTTP/1.1",
        "GET /defect HTTP/1.1",
    ],
)
def test_each_refusal_bears_the_id(place: Address, request_line: str) -> None:
    """Of a request that was understood, and of one that was not."""
    head = f"{request_line}\r\nHost: localhost\r\nX-Request-Id: mine\r\nConnection: close\r\n\r\n"
    assert _ask(place, head.encode())[0] == "mine"


def test_two_requests_on_a_connection_have_two_ids(place: Address) -> None:
    """The one that names none does not get the one before."""
    first = b"GET /200 HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: mine\r\n\r\n"
    second = b"GET /200 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection((place.host, place.port), PATIENCE) as client:
        client.sendall(first + second)
        with client.makefile("rb") as stream:
            ids = re.findall(rb"X-Request-Id: (\S+)", stream.read())
    assert (len(ids), ids[0]) == (2, b"mine")
    assert re.fullmatch(b"[0-9a-f]{12}", ids[1])


def test_a_request_that_is_passed_on_keeps_its_id(place: Address) -> None:
    """The process that took over says the same one."""
    log.begin_request("mine")
    assert relay(Request("POST", "/200", {}, {}, b""), place, PATIENCE).body == b"mine"


@pytest.mark.parametrize(
    ("request_line", "level", "said"),
    [
        ("GET /200?token=secret HTTP/1.1", "DEBUG", ("GET", "/200", 200)),
        ("HEAD /304 HTTP/1.1", "DEBUG", ("HEAD", "/304", 304)),
        ("POST /202 HTTP/1.1", "INFO", ("POST", "/202", 202)),
        ("GET /404 HTTP/1.1", "INFO", ("GET", "/404", 404)),
        ("POST /429 HTTP/1.1", "DEBUG", ("POST", "/429", 429)),
        ("GET /503 HTTP/1.1", "WARNING", ("GET", "/503", 503)),
        ("GET /defect HTTP/1.1", "WARNING", ("GET", "/defect", 500)),
        ("nonsense", "INFO", ("", "", 400)),
        ("GET /" + "x" * 4000 + " HTTP/1.1", "INFO", ("GET", "/" + "x" * 2047, 414)),
    ],
)
def test_each_request_is_one_line(
    place: Address, caplog: pytest.LogCaptureFixture, request_line: str, level: str, said: tuple[str, str, int]
) -> None:
    """Of a level by what it did; with what was asked, but not what was asked with; written only if that level is."""
    for written in (logging.DEBUG, logging.WARNING):
        caplog.clear()
        with caplog.at_level(written, "selfupdate"):
            _ask(place, f"{request_line}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            found: list[Any] = [record for record in caplog.records if record.getMessage() == "answered"]
        wanted = [level] if logging.getLevelName(level) >= written else []
        assert [record.levelname for record in found] == wanted
        for record in found:
            assert (record.method, record.path, record.status) == said
            assert 0 <= record.seconds < PATIENCE


@pytest.mark.slow
def test_an_upgrade_bears_its_id_in_both_processes(start: Callable[..., Service], programs: Programs) -> None:
    """And the id of the request that began it; the successor's lines until it has become the service, and no longer."""
    service = start("-probation", "100ms", "-drain", "5s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    answer = service.ask("POST", "/upgrade", headers={"X-Request-Id": "mine"})
    upgrade_id = answer.json["id"]
    assert answer.headers["X-Request-Id"] == "mine"
    service.status_when(lambda status: (status["pid"], status["phase"]) == (service.process.pid, "RUNNING"))
    assert service.ask("POST", "/nothing", headers={"X-Request-Id": "later"}).status == 404
    service.line(request="later")
    service.stop()

    lines = service.lines
    trial = service.line(message="started a successor")["successor"]
    assert service.line(message="answered", path="/upgrade").items() >= {"request": "mine", "status": 202}.items()
    driven = [line for line in lines if line["message"] in {"upgrade", "started a successor"}]
    assert len(driven) == 7
    for line in driven:
        assert (line["request"], line["upgrade"]) == ("mine", upgrade_id), line
    for pid in (trial, service.process.pid):  # and the process that was started, as successor of its successor
        own = [
            line
            for line in lines
            if line["pid"] == pid and line["version"] == "1.1.0" and line.get("request") != "later"
        ]
        settled = [line["message"] for line in own].index("settled")
        assert {line["message"] for line in own[:settled]} == {"standing by", "took over", "serving"}
        assert {line.get("upgrade") for line in own[: settled + 1]} == {upgrade_id}
        assert not [line for line in own[settled + 1 :] if "upgrade" in line]
    assert service.line(message="took over", pid=trial)["request"] == "mine"


@pytest.mark.slow
def test_what_fails_bears_the_ids(start: Callable[..., Service]) -> None:
    """Each line of the way back, and of a choice that came to nothing."""
    service = start()
    shell(service.upgrade_dir / "bad", "2.0.0", "exit 3")
    record = service.ask("POST", "/upgrade?wait=30s", headers={"X-Request-Id": "mine"}).json
    assert record["outcome"] == "aborted"
    assert service.ask("POST", "/upgrade", {"name": "none"}, headers={"X-Request-Id": "other"}).status == 404
    service.stop()
    unsigned = "signatures are not checked: whoever can write to the upgrade directory decides what runs"
    steps = ["upgrade", "upgrade", "started a successor", "upgrade", "the successor ended with status 3", "upgrade"]
    for request, said in (("mine", [unsigned, *steps]), ("other", [unsigned, "upgrade"])):
        lines = [line for line in service.lines if line.get("request") == request]
        done = [line for line in lines if line["message"] != "answered"]
        assert [line["message"] for line in done] == said
        assert len(lines) == len(done) + 1
        assert len({line["upgrade"] for line in done}) == 1
