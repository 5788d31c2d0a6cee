"""What others on the machine and on the network may try: SECURITY.md, section 11, each row with its number."""

from __future__ import annotations

import ast
import contextlib
import errno
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import pytest
from programs import Programs, shell, write_program
from service import PATIENCE, Service, resources

from selfupdate import listener as listeners
from selfupdate import owners
from selfupdate.listener import Address
from selfupdate.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow

# Rows, or the parts of rows, that other tests show: what is said of them there is not said again here.
SHOWN_ELSEWHERE = {
    54: ("test_protocol.py::test_the_temporary_address_is_taken",),  # by this account
    56: ("test_protocol.py::test_replace_needs_the_secret",),  # while an incumbent of this program waits
    57: ("test_protocol.py::test_replace_needs_the_secret",),
    59: ("test_http.py::test_who_may_ask_what",),
    63: ("test_http.py::test_of_many_simultaneous_requests_one_is_accepted",),
    64: ("test_server.py::test_one_request_gets_one_answer",),
    65: (
        "test_server.py::test_a_client_that_does_not_finish_is_cut_off",
        "test_server.py::test_a_client_that_drips_is_cut_off",
    ),
    66: (
        "test_server.py::test_threads_are_bounded_and_all_are_served",
        "test_server.py::test_slow_clients_cost_no_worker",
        "test_server.py::test_new_clients_find_room_among_idle_ones",
    ),
    67: ("test_server.py::test_one_request_gets_one_answer",),
}

NOBODY = 65534
TOKEN = "a-token-that-is-nobody-elses-business"


@pytest.mark.parametrize("row", SHOWN_ELSEWHERE)
def test_what_is_shown_elsewhere_is_there(row: int) -> None:
    """A test that this file relies on has not been renamed, or removed."""
    for where in SHOWN_ELSEWHERE[row]:
        file, _, name = where.partition("::")
        tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, where


# Another account on the same machine.

# Listens on HOST and PORT as nobody, answers all that is asked with BODY, and writes down what was asked.
_SQUAT = """
import os, socket, sys
host, port, body, log = sys.argv[1:]
log = open(log, "ab", buffering=0)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
if ":" in host:
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((host, int(port)))
listener.listen()
print("listening", flush=True)
while True:
    connection, _ = listener.accept()
    log.write(connection.recv(65536))
    answer = f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\nConnection: close\\r\\n\\r\\n{body}"
    connection.sendall(answer.encode())
    connection.close()
"""
HOSTS = ("127.0.0.1", "::")
"""Where a squatter listens that can be reached on 127.0.0.1, by IPv4 and by both."""


class Squatter:
    """Another account's process that listens on an address, and answers everything as a good successor would."""

    def __init__(self, host: str, port: int, pid: int, log: Path) -> None:
        self._log = log
        body = json.dumps({"status": "ok", "version": "2.0.0", "pid": pid, "generation": 1})
        command = [sys.executable, "-ISc", _SQUAT, host, str(port), body, str(log)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"listening\n"

    @property
    def asked(self) -> bytes:
        """All that it was asked."""
        return self._log.read_bytes()

    def leave(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


@pytest.fixture
def squat(tmp_path: Path) -> Iterator[Callable[..., Squatter]]:
    """Make squatters, each gone with the test."""
    if os.geteuid():
        message = "only root can be another account"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with contextlib.ExitStack() as squatters:

        def squat(host: str, port: int, pid: int = 1) -> Squatter:
            if ":" in host and not socket.has_dualstack_ipv6():
                pytest.skip("this machine has no IPv6")
            return squatters.enter_context(Squatter(host, port, pid, tmp_path / "asked"))

        yield squat


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


ASKED_4, ASKED_6 = ("localhost", "127.0.0.1", "0.0.0.0"), ("", "::1", "::")
"""Addresses that are reached on the loopback address of IPv4, and on that of IPv6."""
_REACHED = [
    *itertools.product(ASKED_4, ("127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0")),
    *itertools.product(ASKED_6, ("::1", "::")),
]


@pytest.fixture(params=["asked", "in tables"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernel say who listens where in each of the two ways: one that may not be asked has tables."""
    others = {"asked": "_in_tables", "in tables": "_asked"}
    monkeypatch.setattr(owners, others[request.param], _refuse)


def _refuse(_: int) -> NoReturn:
    raise OSError(errno.EAFNOSUPPORT, "not this way")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("asked", "host"), _REACHED)
def test_whoever_is_reached_is_known(squat: Callable[..., Squatter], asked: str, host: str) -> None:
    """Rows 54 to 58. Where another account's process is reached on an address, it is known to be another account's."""
    address = Address(asked, _free_port())
    squat(host, address.port)
    listeners.connect(address, PATIENCE).close()
    assert 65534 in owners.owners_of(address)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("asked", [*ASKED_4, *ASKED_6])
def test_who_listens_himself_is_known(asked: str) -> None:
    """Rows 54 to 58. What this account listens on is not taken for another's."""
    with listeners.bind(Address(asked, 0)) as listener:
        assert owners.owners_of(listeners.address_of(listener, Address(asked, 0))) == {os.geteuid()}


@pytest.mark.parametrize("host", HOSTS)
def test_another_account_has_the_temporary_address(
    start: Callable[..., Service], squat: Callable[..., Squatter], tmp_path: Path, host: str
) -> None:
    """Row 54. Nothing is started, the old version serves on, and the release is not to blame."""
    port, marker = _free_port(), tmp_path / "ran"
    service = start("-upgrade-bind", f"localhost:{port}")
    shell(service.upgrade_dir / "app", "2.0.0", f": > {marker}")
    squatter = squat(host, port)
    record = service.upgrade()
    assert (record["outcome"], record["code"]) == ("aborted", "handover-bind")
    assert (marker.exists(), squatter.asked) == (False, b"")
    service.wait_until_alone(service.process.pid)
    assert service.get("/version") == {"version": "1.0.0"}
    assert service.get("/candidates")["latest"] == "app"


@pytest.mark.parametrize("host", HOSTS)
def test_another_account_takes_the_temporary_address_from_the_successor(
    start: Callable[..., Service], squat: Callable[..., Squatter], host: str
) -> None:
    """Rows 54 and 55. Who answers there is not taken for the successor, even with its process id, and told nothing."""
    port = _free_port()
    service = start("-upgrade-bind", f"localhost:{port}")
    shell(service.upgrade_dir / "app", "2.0.0", "exec sleep 600")
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    successor = service.line(message="started a successor")["successor"]
    squatter = squat(host, port, successor)
    service.line(upgrade=upgrade_id, phase="RUNNING")
    record = service.get(f"/upgrades/{upgrade_id}")
    assert (record["outcome"], record["code"]) == ("aborted", "handover-bind"), record
    assert b"/replace" not in squatter.asked
    assert b"Authorization" not in squatter.asked
    service.wait_until_alone(service.process.pid)
    assert service.get("/version") == {"version": "1.0.0"}
    squatter.leave()
    assert service.get("/candidates")["latest"] == "app"


# Announces that it stands by on the inherited socket, and leaves its temporary address to others.
_ANNOUNCES = """
import os, signal, socket, sys
if sys.argv[1:] == ["-version"]:
    sys.exit(print("2.0.0"))
open(GATE).close()
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.sendto(b"READY=1\\nX_SELF_UPDATE=1", "\\0" + os.environ["NOTIFY_SOCKET"][1:])
signal.pause()
"""


@pytest.mark.parametrize("host", HOSTS)
def test_another_account_answers_for_a_successor_that_announced_itself(
    start: Callable[..., Service], squat: Callable[..., Squatter], tmp_path: Path, host: str
) -> None:
    """Row 55. An announcement is no proof for whoever listens on the temporary address: nothing is handed over."""
    port, gate = _free_port(), tmp_path / "gate"
    os.mkfifo(gate)
    service = start("-upgrade-bind", f"localhost:{port}")
    head = f"#!{sys.executable} -IS\nGATE = {str(gate)!r}\n"
    write_program(service.upgrade_dir / "app", (head + _ANNOUNCES).encode())
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    squatter = squat(host, port, service.line(message="started a successor")["successor"])
    gate.write_bytes(b"")
    service.line(upgrade=upgrade_id, phase="RUNNING")
    record = service.get(f"/upgrades/{upgrade_id}")
    assert (record["outcome"], record["code"]) == ("aborted", "handover-bind"), record
    assert b"/replace" not in squatter.asked
    assert b"Authorization" not in squatter.asked
    assert service.get("/version") == {"version": "1.0.0"}


_HOLDS_BEFORE_IT_PROBES = """
from selfupdate import successor
probe = successor.Successor.probe
def wait(self):
    open({gate!r}).close()
    probe(self)
successor.Successor.probe = wait
"""


def test_another_account_comes_when_nobody_listens_for_the_successor(
    start: Callable[..., Service], squat: Callable[..., Squatter], programs: Programs, tmp_path: Path
) -> None:
    """Row 55. A successor that announced itself without listening is none: who comes then is handed nothing."""
    port, gate, announced = _free_port(), tmp_path / "gate", tmp_path / "announced"
    for path in (gate, announced):
        os.mkfifo(path)
    holding = programs.faulty("1.0.0", "holding", _HOLDS_BEFORE_IT_PROBES.format(gate=str(gate)))
    service = start("-upgrade-bind", f"localhost:{port}", program=holding)
    head = f"#!{sys.executable} -IS\nGATE = {str(announced)!r}\n"
    write_program(service.upgrade_dir / "app", (head + _ANNOUNCES).encode())
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    announced.write_bytes(b"")
    record = service.record_when(upgrade_id, lambda record: record["phase"] == "PROBING" or record["outcome"])
    if record["outcome"] is None:  # what listens now did not when it stood by
        squatter = squat("127.0.0.1", port, service.line(message="started a successor")["successor"])
        gate.write_bytes(b"")
        service.line(upgrade=upgrade_id, phase="RUNNING")
        assert b"Authorization" not in squatter.asked
    assert service.get(f"/upgrades/{upgrade_id}")["outcome"] == "aborted"


# A plain successor that says that it serves when the gate is shut again, and does not.
_PLAIN = """
import http.server, sys
class Temporary(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/replace":
            open(GATE).read()
        self.send_response(200 if self.path == "/replace" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
if sys.argv[1:] == ["-version"]:
    sys.exit(print("2.0.0"))
host, _, port = sys.argv[sys.argv.index("-upgrade-bind") + 1].rpartition(":")
http.server.HTTPServer((host, int(port)), Temporary).serve_forever()
"""


@pytest.mark.parametrize("host", HOSTS)
def test_another_account_takes_the_service_s_address(
    start: Callable[..., Service], squat: Callable[..., Squatter], tmp_path: Path, host: str
) -> None:
    """Row 58. Its answers are not taken for those of the new version; the old one serves again when it has gone."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    service = start("-probation", "100ms")
    head = f"#!{sys.executable} -IS\nGATE = {str(gate)!r}\n"
    write_program(service.upgrade_dir / "app", (head + _PLAIN).encode())
    port = service.address[1]
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    with gate.open("wb"):  # it was asked to take over, and the address is free
        successors = [line["successor"] for line in service.lines if line["message"] == "started a successor"]
        squatter = squat(host, port, successors[-1])
    line = service.line(upgrade=upgrade_id, phase="ROLLING_BACK")
    assert line["reason"].startswith("another account's process listens on localhost:")
    service.line(message="cannot serve again yet")
    squatter.leave()
    service.line(upgrade=upgrade_id, phase="RUNNING")
    record = service.get(f"/upgrades/{upgrade_id}")
    assert (record["outcome"], record["code"]) == ("rolled-back", "handover-bind")
    assert b"Authorization" not in squatter.asked
    assert service.get("/version") == {"version": "1.0.0"}


SECRET = "the-secret-of-this-handover"


class Standby:
    """A successor of this program, whose incumbent is the test."""

    def __init__(self, program: Path, directory: Path) -> None:
        self.port, self.bind = _free_port(), _free_port()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (directory / "state").mkdir(mode=0o700)
        lock = os.open(directory / "state" / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        trust = {"insecure-allow-unsigned": "true"}
        hello = {"generation": 1, "secret": SECRET, "lock": lock, "program": None, "sha256": "", "installed": "1.0.0"}
        ours.send(json.dumps({**hello, "trust": trust, "streams": []}).encode())
        flags = ["-upgrade-bind", f"localhost:{self.port}", "-bind", f"localhost:{self.bind}"]
        self.process = subprocess.Popen(
            [str(program), "-upgrade", "true", *flags, "-state-dir", str(directory / "state")],
            env={**os.environ, "SELF_UPDATE_HANDOVER_FD": str(theirs.fileno())},
            pass_fds=[theirs.fileno(), lock],
            stderr=subprocess.PIPE,
        )
        self._channel = ours
        theirs.close()
        os.close(lock)
        assert self.process.stderr is not None
        assert any(b'"standing by"' in line for line in self.process.stderr)

    def ask(self, path: str, *fields: str, port: int | None = None) -> tuple[int, Any]:
        """Ask on the temporary server, unless on another."""
        lines = "".join(f"{field}\r\n" for field in fields)
        answer = _raw(("127.0.0.1", port or self.port), f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n")
        return answer.status, json.loads(answer.body)

    def close(self) -> None:
        self._channel.close()
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)


class Raw:
    """An answer as it came."""

    def __init__(self, answer: bytes) -> None:
        self.head, _, self.body = answer.partition(b"\r\n\r\n")
        self.status = int(answer[9:12])


def _raw(address: tuple[str, int], request: str | bytes) -> Raw:
    """Send a request as it is, and return all that is answered until the connection ends."""
    if isinstance(request, str):
        request = request.encode("latin-1")
    request = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    with socket.create_connection(address, PATIENCE) as client:
        client.sendall(request)
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    return Raw(answer)


PROOF = f"Authorization: Bearer {SECRET}"
_OF_BROWSERS = (
    "Origin: http://localhost",
    "Origin: null",
    "Referer: http://localhost/",
    "Cookie: a=b",
    "Sec-Fetch-Site: none",
    "Sec-Fetch-Mode: navigate",
    "Sec-Fetch-Dest: image",
)
_NO_PROOFS = (
    "X-Nothing: there",
    "Authorization:",
    "Authorization: Bearer",
    f"Authorization: {SECRET}",
    f"Authorization: Basic {SECRET}",
    f"{PROOF[:-1]}",
    f"{PROOF}x",
    "Authorization: Bearer \xe9\xff",
)


def test_who_may_make_a_successor_take_over(programs: Programs, tmp_path: Path) -> None:
    """Row 56. Without the proof, with a wrong one, or from a browser nothing happens; the right one works once."""
    with contextlib.closing(Standby(programs.version("2.0.0"), tmp_path)) as standby:
        for field in _NO_PROOFS:
            assert standby.ask("/replace", field)[0] == 403, field
        assert standby.ask(f"/replace?secret={SECRET}")[0] == 403
        for field in _OF_BROWSERS:
            assert standby.ask("/replace", PROOF, field)[0] == 403, field
        with pytest.raises(ConnectionRefusedError):
            standby.ask("/status", port=standby.bind)
        assert standby.ask("/replace", PROOF) == (200, {"status": "ok", "pid": standby.process.pid})
        for field in (PROOF, PROOF, "Authorization: Bearer"):
            assert standby.ask("/replace", field)[0] == 403
        status, answer = standby.ask("/status", port=standby.bind)
        assert (status, answer["phase"]) == (200, "TRIAL")


# Writes down what it was told, and by which way, and stays until the gate is shut again.
_LISTENS = """
import json, os, socket, sys
told = {"environ": dict(os.environ), "arguments": sys.argv}
def write(name):
    with open(f"{LOG}-{name}.new", "w") as file:
        json.dump(told, file)
    os.rename(f"{LOG}-{name}.new", f"{LOG}-{name}")
if sys.argv[1:] == ["-version"]:
    write("version")
    sys.exit(print("2.0.0"))
told["hello"] = socket.socket(fileno=int(os.environ["SELF_UPDATE_HANDOVER_FD"])).recv(1 << 18).decode()
write("successor")
open(GATE).read()
sys.exit(3)
"""


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """Write the token into a file that nobody else may read."""
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(f"{TOKEN}\n", encoding="ascii")
    return path


def _shown_of(pid: int) -> bytes:
    """Return what /proc shows of a process's start; nothing where it has ended."""
    try:
        return b"".join(Path(f"/proc/{pid}/{entry}").read_bytes() for entry in ("cmdline", "environ"))
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_no_secret_can_be_read_during_an_upgrade(start: Callable[..., Service], token_file: Path) -> None:
    """Row 57. Neither the handover's secret nor the token is in arguments, environments, the log, or on disk."""
    directory = token_file.parent
    gate, log = directory / "gate", directory / "told"
    os.mkfifo(gate)
    service = start("-token-file", str(token_file))
    head = f"#!{sys.executable} -IS\nLOG, GATE = {str(log)!r}, {str(gate)!r}\n"
    write_program(service.upgrade_dir / "app", (head + _LISTENS).encode())
    upgrade_id = service.ask("POST", "/upgrade", headers={"Authorization": f"Bearer {TOKEN}"}).json["id"]
    successor = service.line(message="started a successor")["successor"]
    with gate.open("wb"):
        secret = json.loads(json.loads(Path(f"{log}-successor").read_text(encoding="utf-8"))["hello"])["secret"]
        everything = [(pid, _shown_of(pid)) for pid in service.pids()]
        assert {service.process.pid, successor} <= {pid for pid, content in everything if content}
        assert len(secret) >= 32
        for pid, content in everything:
            assert secret.encode() not in content, pid
            assert TOKEN.encode() not in content, pid
    service.line(upgrade=upgrade_id, phase="RUNNING")
    said = json.dumps([service.lines, service.get("/upgrades"), service.get("/status"), service.get("/candidates")])
    kept = [path.read_bytes() for path in service.state_dir.rglob("*") if path.is_file()]
    told = Path(f"{log}-version").read_text(encoding="utf-8")
    assert "SELF_UPDATE" not in told
    for text in (said, told, *map(str, kept)):
        assert secret not in text
        assert TOKEN not in text


# The token.


def _authorization(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_the_token_is_asked_for(start: Callable[..., Service], token_file: Path) -> None:
    """Row 62. Each POST needs it, in its field, and gets 401 and no hint without; no GET does; and it is not logged."""
    service = start("-token-file", str(token_file))
    for path in ("/", "/version", "/healthz", "/status", "/candidates", "/upgrades"):
        assert service.ask("GET", path).status == 200
    fields = ["", "Authorization: Bearer", f"Authorization: Bearer {TOKEN}x", f"Authorization: Basic {TOKEN}"]
    fields += [f"Authorization: {TOKEN}", "Authorization: Bearer \xe9\xff", "Authorization: Bearer =?utf-8?q?a?="]
    requests = [("/upgrade", field) for field in fields]
    requests += [(f"/upgrade?token={TOKEN}", ""), (f"/rollback?access_token={TOKEN}", ""), ("/rollback", "")]
    for path, field in requests:
        line = f"{field}\r\n" if field else ""
        answer = _raw(service.address, f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{line}Content-Length: 0\r\n\r\n")
        assert answer.status == 401, (path, field)
        assert b"\r\nWWW-Authenticate: Bearer\r\n" in answer.head + b"\r\n"
        assert TOKEN.encode() not in answer.body
    assert len(requests) == 10
    assert service.ask("POST", "/upgrade", headers=_authorization(TOKEN)).json["outcome"] == "up-to-date"
    shell(service.upgrade_dir / "app", "2.0.0", "exit 3")
    assert service.ask("POST", "/upgrade", headers=_authorization(TOKEN)).status == 202
    service.stop()
    assert TOKEN not in json.dumps(service.lines)
    assert sum(line["message"].startswith("a request had no token") for line in service.lines) == len(requests)


def test_tokens_are_not_guessed_for_long(start: Callable[..., Service], token_file: Path) -> None:
    """Row 62. The eleventh wrong one in a minute, and all behind it, get 429 and no log line; the right one passes."""
    service = start("-token-file", str(token_file))
    answers = [service.ask("POST", "/upgrade", headers=_authorization(f"guess-{number}")) for number in range(15)]
    assert [answer.status for answer in answers] == [401] * 10 + [429] * 5
    assert answers[-1].headers["Retry-After"] == "60"
    assert service.ask("POST", "/upgrade", headers=_authorization(TOKEN)).status == 200
    service.stop()
    assert sum(line["message"].startswith("a request had no token") for line in service.lines) == 10


def _run(program: Path, *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(program), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **options)


@pytest.mark.parametrize("bind", ["0.0.0.0:0", ":0", "[::]:0"])
def test_a_service_for_other_machines_needs_a_token(programs: Programs, tmp_path: Path, bind: str) -> None:
    """Row 62. Without one it is not started, and one line says which flag is missing."""
    ran = _run(programs.version("1.0.0"), "-bind", bind, "-state-dir", str(tmp_path / "state"))
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert "give the token that a POST must bear with -token-file FILE" in ran.stderr


def test_a_service_for_other_machines_with_a_token(start: Callable[..., Service], token_file: Path) -> None:
    """Row 62. It serves, and who has no token changes nothing."""
    service = start("-bind", "0.0.0.0:0", "-token-file", str(token_file), "-allowed-signers", "/nowhere")
    address = ("127.0.0.1", service.address[1])
    assert service.ask("GET", "/version", address=address).status == 200
    assert service.ask("POST", "/upgrade", address=address).status == 401


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (f"{TOKEN}\n", 0o640, "can be read by others; chmod 600 "),
        (f"{TOKEN}\n", 0o604, "can be read by others; chmod 600 "),
        (f"{TOKEN}\n", 0o622, "can be changed by everybody; chmod "),
        ("short\n", 0o600, "does not hold one token of 16 to 512 printable ASCII characters"),
        (f"{TOKEN}\n{TOKEN}\n", 0o600, "does not hold one token"),
        ("é" * 20, 0o600, "does not hold one token"),
        ("", 0o600, "does not hold one token"),
        (None, 0o600, "cannot be read: No such file or directory"),
    ],
    ids=["group", "others", "writable", "short", "two", "not-ascii", "empty", "missing"],
)
def test_a_token_file_that_protects_nothing(
    programs: Programs, tmp_path: Path, content: str | None, mode: int, why: str
) -> None:
    """Row 62. A service whose token others can read, or guess, is not started."""
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content, encoding="utf-8")
        path.chmod(mode)
    flags = ("-bind", "localhost:0", "-state-dir", str(tmp_path / "state"), "-token-file", str(path))
    ran = _run(programs.version("1.0.0"), *flags)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
    assert why in ran.stderr
    assert TOKEN not in ran.stderr


def test_the_commands_bear_the_token(start: Callable[..., Service], programs: Programs, token_file: Path) -> None:
    """Row 62. -apply and -rollback work with the file that holds it, and say that they need it; -status does not."""
    service = start("-token-file", str(token_file), "-probation", "100ms", "-drain", "2s")
    service.line(message="serving")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    asked = ("-state-dir", str(service.state_dir))
    for flag, journey in (("-apply", "1.0.0 -> 1.1.0"), ("-rollback", "1.1.0 -> 1.0.0")):
        refused = _run(service.program, *asked, flag)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.endswith("wants its token; name the file that holds it with -token-file\n")
        ran = _run(service.program, *asked, flag, "-token-file", str(token_file))
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.endswith(f"committed: {journey}\n")
    assert _run(service.program, *asked, "-status").returncode == 0
    assert TOKEN not in json.dumps(service.lines)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_socket_that_was_passed_on_for_other_machines(programs: Programs, tmp_path: Path, host: str) -> None:
    """Row 62. What a service manager binds for everybody needs a token, too, whatever -bind says."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        fd = listener.fileno()
        script = f'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$0" "$@" 3<&{fd}'
        command = [str(programs.version("1.0.0")), "-bind", "localhost:0", "-state-dir", str(tmp_path / "state")]
        ran = _run(Path("/bin/bash"), "-c", script, *command, pass_fds=[fd])
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.endswith("give the token that a POST must bear with -token-file FILE\n")
    assert '"serving"' not in ran.stderr


# Browsers, and clients that are none.


@pytest.fixture(scope="module")
def site(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Start one service for all that must leave no trace in it, with a candidate that nobody may start."""
    with Service(programs.version("1.0.0"), tmp_path_factory.mktemp("site")) as service:
        service.line(message="serving")
        shell(service.upgrade_dir / "app", "2.0.0", "exit 3")
        yield service
        assert service.get("/upgrades") == {"upgrades": []}
        assert service.get("/status")["phase"] == "RUNNING"


FORM = "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n"


@pytest.mark.parametrize(
    ("request_line", "fields", "body", "status"),
    [
        ("POST /upgrade", "Origin: http://evil.example\r\n" + FORM, "name=app", 403),
        ("POST /upgrade", "Origin: null\r\n" + FORM, "", 403),
        ("POST /upgrade", "Sec-Fetch-Site: cross-site\r\n" + FORM, "", 403),
        ("POST /upgrade", "Origin: http://localhost.evil.example\r\n" + FORM, "", 403),
        ("POST /upgrade", "Origin: http://localhost:1\r\n" + FORM, "", 403),
        ("POST /rollback", "Origin: http://evil.example\r\n" + FORM, "", 403),
        ("POST /upgrade", FORM, "name=app", 400),  # a form of a browser that says nothing of itself
        ("GET /upgrade", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Dest: image\r\n", "", 405),
        ("GET /upgrade", "", "", 405),
        ("HEAD /upgrade", "", "", 405),
        ("GET /rollback", "", "", 405),
        ("OPTIONS /upgrade", "Origin: http://evil.example\r\nAccess-Control-Request-Method: POST\r\n", "", 405),
    ],
)
def test_what_a_page_of_another_site_can_send(
    site: Service, request_line: str, fields: str, body: str, status: int
) -> None:
    """Row 60. Forms, images and preflights start nothing."""
    head = fields.format(len(body))
    answer = _raw(site.address, f"{request_line} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n{body}")
    assert answer.status == status
    assert b"Access-Control" not in answer.head
    if status == 405:
        assert b"\r\nAllow: POST\r\n" in answer.head + b"\r\n"


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (["evil.example"], 421),
        (["evil.example:8080"], 421),
        (["localhost.evil.example"], 421),
        (["evil.example#localhost"], 421),
        (["localhost/x"], 421),
        (["localhost:80x"], 421),
        (["localhost:80:80"], 421),
        (["localhost:-1"], 421),
        (["evil@localhost"], 421),
        (["localhost localhost"], 421),
        (["127.0.0.1.evil.example"], 421),
        (["[::1"], 421),
        (["0x7f000001"], 421),
        ([""], 421),
        ([], 400),
        (["localhost", "localhost"], 400),
        (["localhost", "evil.example"], 400),
        (["localhost"], 200),
        (["127.0.0.1:8080"], 200),
    ],
)
def test_by_which_name_it_is_called(site: Service, hosts: list[str], status: int) -> None:
    """Row 61. A name that is not the service's is refused for everything; so is none, or more than one."""
    fields = "".join(f"Host: {host}\r\n" for host in hosts)
    assert _raw(site.address, f"GET /status HTTP/1.1\r\n{fields}\r\n").status == status
    if status != 200:
        answer = _raw(site.address, f"POST /upgrade HTTP/1.1\r\n{fields}Content-Length: 0\r\n\r\n")
        assert answer.status == status


def test_many_idle_connections_during_an_upgrade(start: Callable[..., Service], programs: Programs) -> None:
    """Row 66. 200 that say nothing cost no thread, keep nobody out, and hold no upgrade up."""
    service = start("-probation", "100ms", "-drain", "1s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    with contextlib.ExitStack() as clients:
        for number in range(200):
            client = clients.enter_context(socket.create_connection(service.address, PATIENCE))
            if number % 2:
                client.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert service.get("/version") == {"version": "1.0.0"}
        assert resources(service.process.pid)["task"] < Limits().threads + 10
        assert service.upgrade()["outcome"] == "committed"
        status = service.status_when(lambda status: status["phase"] == "RUNNING" and status["version"] == "1.1.0")
    assert resources(status["pid"])["task"] < Limits().threads + 10


_SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        *(
            (f"GET {path}", 200)
            for path in (
                "/",
                "/app.js",
                "/style.css",
                "/view.js",
                "/version",
                "/healthz",
                "/status",
                "/candidates",
                "/upgrades",
            )
        ),
        ("GET /nothing", 404),
        ("PUT /upgrade", 405),
        ("GET http://localhost/", 400),
        ("nonsense", 400),
        ("GET /" + "x" * 3000, 414),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_the_fields_of_each_answer(site: Service, request_line: str, status: int) -> None:
    """Row 68. All tell browsers to run nothing but the service's own files; none tells what it is made of."""
    answer = _raw(site.address, f"{request_line} HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.status == status
    fields = dict(line.split(": ", 1) for line in answer.head.decode("latin-1").split("\r\n")[1:])
    assert {name: fields.get(name) for name in _SAFE} == _SAFE
    assert fields["Server"] == "self-update"
    assert not re.search(rb"(?i)python|basehttp|[0-9]\.1[0-9]\.", answer.head)
