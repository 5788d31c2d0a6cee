"""The plain protocol, and foreign programs in both roles: no party needs to know the other."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from programs import fake
from service import PATIENCE, wait_for_end

if TYPE_CHECKING:
    from collections.abc import Callable

    from programs import Programs
    from service import Service

pytestmark = pytest.mark.slow


def test_a_foreign_successor_of_the_plain_protocol_takes_over(start: Callable[..., Service]) -> None:
    """It gets the arguments that the contract names, exactly so, and binds the address itself."""
    service = start("-probation", "300ms", "-drain", "30s")
    address = service.address
    fake(service.upgrade_dir / "foreign", "plain", "2.0.0", "serves")
    answer = service.ask("POST", "/upgrade?wait=30s")
    assert (answer.status, answer.json["outcome"]) == (200, "committed"), answer.json
    service.process.wait(PATIENCE)
    served = service.ask("GET", "/version", address=address).json
    upgrade_bind = served["arguments"][3]
    assert served["arguments"] == [
        *("-upgrade", "true", "-upgrade-bind", upgrade_bind, "-bind", f"{address[0]}:{address[1]}")
    ]
    assert upgrade_bind.startswith("localhost:")


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("never serves", "foreign did not take over: it said so, and does not listen on localhost:{port}: "),
        ("dies", "foreign ended with status 7 "),
        ("answers 500", "foreign is not healthy: it answered 500 on trial"),
        ("dies after its first answer", "foreign ended with status 7 on trial"),
    ],
)
def test_a_plain_successor_that_fails_is_rolled_back(start: Callable[..., Service], mode: str, reason: str) -> None:
    """The incumbent binds the address again, and serves."""
    service = start("-probation", "5s")
    address = service.address
    fake(service.upgrade_dir / "foreign", "plain", "2.0.0", mode)
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    service.line(upgrade=upgrade_id, outcome="rolled-back")
    record = service.get(f"/upgrades/{upgrade_id}")
    assert record["reason"].startswith(reason.format(port=address[1]))
    assert service.address == address
    assert service.get("/version") == {"version": "1.0.0"}
    service.wait_until_alone(service.process.pid)
    assert service.upgrade()["outcome"] == "up-to-date"


def test_a_plain_successor_that_cannot_be_reached_costs_nothing(start: Callable[..., Service]) -> None:
    """What is to be asked is reached before the service gives its address up, which therefore goes on."""
    service = start()
    fake(service.upgrade_dir / "foreign", "plain", "2.0.0", "goes deaf")
    record = service.upgrade()
    assert record["outcome"] == "aborted"
    assert record["reason"] == "foreign did not answer GET /replace when it was to take over in time"
    assert "REPLACING" not in [step["phase"] for step in record["timeline"]]
    assert service.get("/version") == {"version": "1.0.0"}
    assert service.upgrade()["outcome"] == "up-to-date"


def test_a_foreign_successor_of_the_full_protocol_takes_over(start: Callable[..., Service]) -> None:
    """It inherits the listener, and the connections that waited are answered."""
    service = start("-probation", "300ms", "-drain", "30s")
    fake(service.upgrade_dir / "foreign", "full", "2.0.0", "serves")
    record = service.ask("POST", "/upgrade?wait=30s").json
    assert record["outcome"] == "committed", record
    service.process.wait(PATIENCE)
    assert service.get("/version")["version"] == "2.0.0"


def test_a_successor_that_announces_itself_and_does_not_listen(start: Callable[..., Service]) -> None:
    """It is to blame, and is not chosen again unasked."""
    service = start()
    fake(service.upgrade_dir / "foreign", "full", "2.0.0", "does not listen")
    record = service.upgrade()
    assert (record["outcome"], record["code"], record["is_fault_of_release"]) == ("aborted", "handover-bind", True)
    assert record["reason"].startswith("foreign does not listen on localhost:")
    assert service.upgrade()["outcome"] == "up-to-date"


def _free_addresses() -> list[str]:
    with closing(socket.socket()) as first, closing(socket.socket()) as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in (first, second)]


@pytest.mark.parametrize("mode", ["stops first", "asks first"])
def test_this_program_succeeds_a_foreign_incumbent(programs: Programs, tmp_path: Path, mode: str) -> None:
    """It stands by, binds when asked, and serves on when the incumbent has gone."""
    bind, upgrade_bind = _free_addresses()
    incumbent = fake(tmp_path / "incumbent", "incumbent", "1.0.0", mode)
    environ = {"SELF_UPDATE_STATE_DIR": str(tmp_path / "state"), "PATH": os.environ["PATH"]}
    with subprocess.Popen(
        [incumbent, bind, upgrade_bind, programs.version("2.0.0")], env=environ, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"200\n"
        assert process.wait(PATIENCE) == 0
    connection = http.client.HTTPConnection(bind, timeout=PATIENCE)
    connection.request("GET", "/status", headers={"Connection": "close"})
    status = _json(connection)
    assert (status["version"], status["phase"], status["generation"]) == ("2.0.0", "RUNNING", 1)
    os.kill(status["pid"], signal.SIGTERM)
    wait_for_end(status["pid"])


def test_this_program_leaves_when_a_foreign_incumbent_dies(programs: Programs, tmp_path: Path) -> None:
    """A successor that nobody will ask any more gives its temporary address back."""
    bind, upgrade_bind = _free_addresses()
    incumbent = fake(tmp_path / "incumbent", "incumbent", "1.0.0", "dies")
    with subprocess.Popen(
        [incumbent, bind, upgrade_bind, programs.version("2.0.0")],
        env={"SELF_UPDATE_STATE_DIR": str(tmp_path / "state"), "PATH": os.environ["PATH"]},
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()  # until the successor has ended, too
    assert b'"the incumbent has gone without a blessing"' in said
    assert b'"retired"' in said


def test_two_of_this_program_speak_the_plain_protocol_with_each_other(
    start: Callable[..., Service], programs: Programs
) -> None:
    """A successor that was told nothing but its arguments takes over from this program as an incumbent."""
    service = start("-probation", "300ms", "-drain", "5s")
    forget = (
        "import os\nfor name in [*os.environ]:\n    if name.startswith(('LISTEN_', 'NOTIFY_', 'SELF_UPDATE_HAND')):"
    )
    program = programs.faulty("2.0.0", "forgetful", f"{forget}\n        del os.environ[name]")
    program.rename(service.upgrade_dir / "forgetful")
    assert service.upgrade()["outcome"] == "committed"
    assert service.get("/status")["version"] == "2.0.0"


def test_the_temporary_address_is_taken(start: Callable[..., Service], programs: Programs) -> None:
    """Somebody else's listener there stops the upgrade before anything is started, and is no fault of the release."""
    with closing(socket.create_server(("127.0.0.1", 0))) as squatter:
        service = start("-upgrade-bind", f"localhost:{squatter.getsockname()[1]}")
        (service.upgrade_dir / "good").symlink_to(programs.version("2.0.0"))
        record = service.upgrade()
        assert record["outcome"] == "aborted"
        assert "cannot be used: Address already in use" in record["reason"]
    assert service.get("/candidates")["latest"] == "good"


def test_replace_needs_the_secret(start: Callable[..., Service], programs: Programs, tmp_path: Path) -> None:
    """Nobody but the incumbent can make a successor take over, and no secret is in its arguments or environment."""
    gate = tmp_path / "gate"
    hold = f"""
from selfupdate import successor
probe = successor.Successor.probe
def wait(self):
    probe(self)
    open({str(gate)!r}).close()
successor.Successor.probe = wait
"""
    os.mkfifo(gate)
    service = start("-probation", "100ms", program=programs.faulty("1.0.0", "holding", hold))
    (service.upgrade_dir / "good").symlink_to(programs.version("2.0.0"))
    service.ask("POST", "/upgrade")
    pid = service.line(message="started a successor")["successor"]
    service.line(phase="PROBING")
    arguments = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
    environ = Path(f"/proc/{pid}/environ").read_text(encoding="utf-8")
    assert "NOTIFY_SOCKET=" in environ
    host, _, port = arguments[arguments.index("-upgrade-bind") + 1].rpartition(":")
    for headers in (
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer guess"},
        {"Origin": "http://localhost"},
    ):
        answer = service.ask("GET", "/replace", headers=headers, address=(host, int(port)))
        assert answer.status == 403
        assert answer.headers["Content-Type"] == "application/problem+json"
    assert service.ask("POST", "/replace", address=(host, int(port))).status == 405
    assert service.ask("GET", "/healthz", address=(host, int(port))).json["pid"] == pid
    assert service.get("/status")["version"] == "1.0.0"
    gate.write_bytes(b"")
    service.status_when(lambda status: status["phase"] == "RUNNING" and status["version"] == "2.0.0")


def _json(connection: http.client.HTTPConnection) -> Any:
    with closing(connection):
        return json.loads(connection.getresponse().read())
