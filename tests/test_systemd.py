"""Under a real systemd, with the unit that the program prints, set up as the README says."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from programs import shell, write_program
from service import PATIENCE
from systemd import Systemd, Unit

from selfupdate.settings import parse
from selfupdate.unit import unit as print_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keys import SshKeys
    from programs import Programs

pytestmark = pytest.mark.slow

README = Path(__file__).resolve().parent.parent / "README.md"
STARTED = "Started self-update.service - HTTP service that replaces itself with a newer version of itself."
DRAIN = 5.0
QUICK = f"-probation 100ms -drain {DRAIN:.0f}s"
HERE = "/var/lib/self-update"

# The loop that accepts connections waits for ever, once: the next start finds the marker.
HANGS_ONCE = """
import pathlib, threading
from selfupdate import server
accept = server.Server._accept_waiting
def hang(self, listener, count):
    marker = pathlib.Path("hung")
    if count is None or marker.exists():  # None: it is told to stop
        return accept(self, listener, count)
    marker.touch()
    threading.Event().wait()
server.Server._accept_waiting = hang
"""
IS_UNHEALTHY_ON_TRIAL = """
from selfupdate import messages, presence
health = presence.Presence.health
def answer(self):
    return messages.problem(503, "Out of order.") if self._lifecycle.phase == "TRIAL" else health(self)
presence.Presence.health = answer
"""


def blocks(language: str) -> list[str]:
    """Return the README's examples in a language about service managers."""
    section = README.read_text(encoding="utf-8").partition("## Under a service manager\n")[2].partition("\n## ")[0]
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", section)


class Site:
    """A machine on which the README's recipe is followed, and the service that it leads to."""

    def __init__(self, machine: Systemd, programs: Programs, ssh: SshKeys) -> None:
        self.machine = machine
        self.programs = programs
        self._alice = ssh.key("alice")

    def install(self, program: Path | None = None, flags: str = QUICK, bind: str = ":8443") -> Unit:
        """Follow the recipe, with short times; return the service, which systemd has started."""
        here = self.machine.root / "root"
        (here / "dist").mkdir()
        shutil.copy2(program or self.programs.version("1.0.0"), here / "dist/self-update")
        (here / "allowed-signers").write_text(self._alice.line(), encoding="utf-8")
        write_program(self.machine.root / "opt/sudo", b'#!/bin/sh\nexec "$@"\n')
        recipe = blocks("sh")[0].replace("-bind :8443", f"-bind {bind}").replace("-print-unit", f"{flags} -print-unit")
        self.machine.run("sh", "-ec", f"cd; PATH=$PATH:/opt; {recipe}")
        unit = Unit(self.machine, "self-update.service")
        token = (self.machine.root / "etc/self-update/token").read_text(encoding="ascii").strip()
        unit.headers["Authorization"] = f"Bearer {token}"
        return unit

    def offer(self, program: Path) -> None:
        """Put a candidate and its signature where the service looks for them."""
        upgrades = self.machine.root / HERE.strip("/") / "upgrades"
        (upgrades / f"{program.name}.sig").write_bytes(self._alice.sign(program.read_bytes()))
        shutil.copy2(program, upgrades / f"{program.name}.part")
        (upgrades / f"{program.name}.part").rename(upgrades / program.name)

    def upgrade(self, unit: Unit, version: str) -> None:
        """Upgrade to a version, and wait until the process that systemd knows serves again."""
        self.offer(self.programs.version(version))
        record = unit.upgrade()
        assert (record["to"], record["outcome"]) == (version, "committed"), record
        self.settled(unit)

    def settled(self, unit: Unit) -> Any:
        """Return the status when the process that systemd knows serves, and no other is left."""
        return unit.status_when(
            lambda status: (status["pid"], status["phase"]) == (unit.main_pid, "RUNNING") and len(unit.processes()) == 1
        )

    def assert_nothing_is_left(self) -> None:
        left = [process for process in self.machine.inhabitants() if HERE in " ".join(process.arguments)]
        assert not left, left

    def command(self, *arguments: str) -> str:
        """Run the installed program as its account, and return what it prints."""
        command = ("runuser", "-u", "self-update", "--", f"{HERE}/bin/self-update", "-state-dir", HERE)
        return self.machine.run(*command, "-token-file", "/etc/self-update/token", *arguments).stdout


def started_again(unit: Unit, why: str) -> None:
    """Wait until systemd has started the service again after what it said about the unit."""
    since = unit.lines.index(unit.line(message=f"{unit.name}: {why}"))
    unit.line(since, message=STARTED)


@pytest.fixture
def site(programs: Programs, ssh: SshKeys) -> Iterator[Site]:
    """Boot a machine, which ends with the test."""
    with Systemd() as machine:
        yield Site(machine, programs, ssh)


def test_the_readme_leads_from_nothing_to_running(site: Site) -> None:
    """Its commands, one after the other, end with a service that is active, as an account that may do nothing else."""
    unit = site.install()
    assert unit.show("ActiveState", "Type", "NotifyAccess") == ["active", "notify", "main"]
    status = unit.get("/status")
    assert (status["version"], status["pid"]) == ("1.0.0", unit.main_pid)
    assert status["trust"]["checked"] is True
    assert site.command("-status").startswith(f"1.0.0 on :8443: RUNNING, process {unit.main_pid}\n")
    about = site.machine.run("cat", f"/proc/{unit.main_pid}/status").stdout
    rights = dict(re.findall(r"(?m)^(CapBnd|NoNewPrivs|Seccomp):\t(.*)$", about))
    assert rights == {"CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    warnings = site.machine.run("journalctl", "--priority=warning", "--output=cat", "--quiet", "_PID=1").stdout
    assert warnings == "", "systemd found something in the unit"


def test_the_main_process_stays_the_same(site: Site) -> None:
    """Upgrade after upgrade, systemd sees one process and nothing else: no restart, no other main process."""
    unit = site.install()
    main = unit.main_pid
    for version in ("1.1.0", "1.2.0", "1.3.0"):
        site.upgrade(unit, version)
        assert unit.show("MainPID", "NRestarts", "ActiveState", "SubState") == [str(main), "0", "active", "running"]
    assert unit.get("/status")["installed"] == {"version": "1.3.0", "reason": None}
    assert "1.3.0" in unit.show("StatusText")[0]
    assert site.machine.run("journalctl", "--priority=warning", "--output=cat", "--quiet", "_PID=1").stdout == ""


def test_the_journal_has_the_lines_of_all_versions(site: Site) -> None:
    """Each says in the unit's journal that it serves, and so does the last one that it stops."""
    unit = site.install()
    for version in ("1.1.0", "1.2.0"):
        site.upgrade(unit, version)
    unit.systemctl("stop")
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        unit.line(message="serving", version=version)
    unit.line(message="stopped", version="1.2.0")


def test_a_reload_upgrades(site: Site) -> None:
    """`systemctl reload` starts an upgrade, the unit is reloading for as long as it lasts, and active thereafter."""
    unit = site.install(flags=f"{QUICK} -probation 5s")
    main = unit.main_pid
    site.offer(site.programs.version("1.1.0"))
    unit.systemctl("reload", "--no-block")
    unit.line(phase="PROBATION")
    assert unit.show("ActiveState") == ["reloading"]
    unit.line(phase="RETIRED", outcome="committed")
    assert site.settled(unit)["version"] == "1.1.0"
    assert unit.show("ActiveState", "MainPID", "NRestarts") == ["active", str(main), "0"]


def test_a_reload_without_a_candidate_changes_nothing(site: Site) -> None:
    """Where nothing is newer, the unit is active as before."""
    unit = site.install()
    main = unit.main_pid
    unit.systemctl("reload", "--no-block")
    unit.line(message="up to date")
    assert unit.show("ActiveState", "MainPID", "NRestarts") == ["active", str(main), "0"]


@pytest.mark.parametrize("kind", ["exits", "is-unhealthy", "tells-no-version"])
def test_a_failing_candidate_leaves_the_unit_active(site: Site, tmp_path: Path, kind: str) -> None:
    """Whatever becomes of a candidate, systemd sees the main process serve, and no failure."""
    unit = site.install()
    main = unit.main_pid
    if kind == "is-unhealthy":
        candidate = site.programs.faulty("2.0.0", kind, IS_UNHEALTHY_ON_TRIAL)
    else:
        candidate = shell(tmp_path / kind, "2.0.0" if kind == "exits" else "none", "exit 3")
    site.offer(candidate)
    unit.systemctl("reload", "--no-block")
    if kind == "tells-no-version":
        unit.line(message="up to date")
    else:
        unit.line(phase="RUNNING", outcome="rolled-back" if kind == "is-unhealthy" else "aborted")
    assert site.settled(unit)["version"] == "1.0.0"
    assert unit.show("ActiveState", "MainPID", "NRestarts", "Result") == ["active", str(main), "0", "success"]


def test_a_restart_starts_the_version_that_was_upgraded_to(site: Site) -> None:
    """What systemd starts is the file that the upgrade has replaced."""
    unit = site.install()
    site.upgrade(unit, "1.1.0")
    before = unit.main_pid
    unit.systemctl("restart")
    status = site.settled(unit)
    assert (status["version"], status["generation"]) == ("1.1.0", 0)
    assert status["pid"] != before
    assert unit.show("NRestarts", "Result") == ["0", "success"]


def test_a_crash_of_the_new_version_restarts_it(site: Site) -> None:
    """The new version is started again, and not the one that the unit was written for."""
    unit = site.install()
    site.upgrade(unit, "1.1.0")
    crashed = unit.main_pid
    site.machine.run("kill", "-KILL", str(crashed))
    started_again(unit, "Main process exited, code=killed, status=9/KILL")
    status = site.settled(unit)
    assert status["version"] == "1.1.0"
    assert status["pid"] != crashed
    assert unit.show("ActiveState", "NRestarts") == ["active", "1"]


def test_wrong_usage_is_not_tried_again(site: Site) -> None:
    """A unit with a flag that there is not fails at once, and for good."""
    unit = site.install()
    unit.systemctl("stop")
    path = site.machine.root / "etc/systemd/system/self-update.service"
    site.machine.install(path.name, path.read_text(encoding="utf-8").replace("-bind", "-bnid"))
    assert site.machine.run("systemctl", "start", unit.name, check=False).returncode == 1
    assert unit.show("ActiveState", "Result", "ExecMainStatus", "NRestarts") == ["failed", "exit-code", "2", "0"]


@pytest.mark.parametrize("upgrades", [0, 2])
def test_a_stop_ends_everything(site: Site, upgrades: int) -> None:
    """It takes less than -drain, succeeds, and leaves no process."""
    unit = site.install()
    for number in range(upgrades):
        site.upgrade(unit, f"1.{number + 1}.0")
    began = time.monotonic()
    unit.systemctl("stop")
    assert time.monotonic() - began < DRAIN
    assert unit.show("ActiveState", "Result", "ExecMainStatus") == ["inactive", "success", "0"]
    unit.line(message="stopped")
    site.assert_nothing_is_left()


def test_a_stop_in_the_middle_of_an_upgrade_ends_both_versions(site: Site) -> None:
    """The main process alone is told, and ends the one on trial: systemd has nothing to kill."""
    unit = site.install(flags=f"{QUICK} -probation 30s")
    site.offer(site.programs.version("1.1.0"))
    unit.systemctl("reload", "--no-block")
    unit.line(phase="PROBATION")
    began = time.monotonic()
    unit.systemctl("stop")
    assert time.monotonic() - began < DRAIN
    assert unit.show("ActiveState", "Result", "ExecMainStatus") == ["inactive", "success", "0"]
    unit.line(message="stopped", version="1.1.0")
    unit.line(message="stopped", version="1.0.0")
    assert not [line for line in unit.lines if "SIGKILL" in line["message"]]
    site.assert_nothing_is_left()


def test_systemd_is_told_of_a_new_main_process(site: Site) -> None:
    """Without -keep-pid the unit goes on with the process that took over, and stops that one."""
    unit = site.install(flags=f"{QUICK} -keep-pid=false")
    first = unit.main_pid
    site.offer(site.programs.version("1.1.0"))
    assert unit.upgrade()["outcome"] == "committed"
    unit.line(message="retired", pid=first)
    status = site.settled(unit)
    assert status["version"] == "1.1.0"
    assert status["pid"] != first
    assert unit.show("ActiveState", "NRestarts") == ["active", "0"]
    unit.systemctl("stop")
    site.assert_nothing_is_left()


@pytest.mark.parametrize("upgrades", [0, 1])
def test_the_watchdog_restarts_a_service_that_hangs(site: Site, upgrades: int) -> None:
    """A process whose loop stands still says nothing any more, and is killed; the same version serves again."""
    versions = ["1.0.0", "1.1.0"][: upgrades + 1]
    hangs = site.programs.faulty(versions[-1], "hangs-once", HANGS_ONCE)
    unit = site.install(program=None if upgrades else hangs)
    if upgrades:
        # It is to hang after it was blessed.
        site.machine.run("touch", f"{HERE}/hung")
        site.offer(hangs)
        assert unit.upgrade()["outcome"] == "committed"
        site.settled(unit)
        site.machine.run("rm", f"{HERE}/hung")
    site.machine.install("self-update.service.d/quick.conf", "[Service]\nWatchdogSec=3s\n")
    unit.systemctl("restart")
    hung = unit.main_pid
    with unit.connect(unit.address, PATIENCE):
        started_again(unit, "Watchdog timeout (limit 3s)!")
    status = site.settled(unit)
    assert status["version"] == versions[-1]
    assert status["pid"] != hung
    assert unit.show("ActiveState", "NRestarts") == ["active", "1"]


def test_the_watchdog_is_content_with_an_upgrade(site: Site) -> None:
    """The main process gives signs of life throughout: while it serves, while it watches, and as what it becomes."""
    unit = site.install(flags=f"{QUICK} -probation 8s")
    site.machine.install("self-update.service.d/quick.conf", "[Service]\nWatchdogSec=4s\n")
    unit.systemctl("restart")
    main = unit.main_pid
    site.upgrade(unit, "1.1.0")
    assert unit.show("MainPID", "NRestarts", "Result") == [str(main), "0", "success"]


def test_systemd_opens_the_socket(site: Site) -> None:
    """The README's socket unit starts the service by its first connection, and keeps those of a time without it."""
    unit = site.install()
    unit.systemctl("stop")
    site.machine.install("self-update.socket", blocks("ini")[0])
    site.machine.run("systemctl", "enable", "--now", "self-update.socket")
    assert unit.show("ActiveState") == ["inactive"]
    address = ("localhost", 443)
    assert unit.ask("GET", "/version", address=address).json == {"version": "1.0.0"}
    main = unit.main_pid
    site.offer(site.programs.version("1.1.0"))
    upgrade_id = unit.ask("POST", "/upgrade", address=address).json["id"]
    unit.line(upgrade=upgrade_id, outcome="committed")
    assert unit.ask("GET", "/version", address=address).json == {"version": "1.1.0"}
    unit.line(message="settled", phase="RUNNING", pid=main)  # before that, a connection of its own may wait for it
    assert unit.main_pid == main
    unit.systemctl("stop")
    assert unit.show("ActiveState", "Result") == ["inactive", "success"]
    assert unit.ask("GET", "/version", address=address).json == {"version": "1.1.0"}
    # It answers before it says that it is ready.
    unit.poll(lambda: unit.show("NRestarts", "ActiveState"), lambda shown: shown == ["0", "active"])


@pytest.mark.parametrize("bind", ["localhost:8080", "[::1]:8080", ":80", "unix:/run/self-update/http"])
def test_the_unit_fits_the_address(site: Site, bind: str) -> None:
    """What a unit for loopback, for a low port or for a Unix socket closes, the service does not need."""
    unit = site.install(bind=bind)
    assert site.command("-status").startswith(f"1.0.0 on {bind}: RUNNING, process {unit.main_pid}\n")
    site.offer(site.programs.version("1.1.0"))
    assert site.command("-apply").splitlines()[-1] == "committed: 1.0.0 -> 1.1.0"
    assert site.command("-status").startswith(f"1.1.0 on {bind}: ")
    unit.systemctl("restart")
    assert site.command("-status").startswith(f"1.1.0 on {bind}: RUNNING, process {unit.main_pid}\n")


def test_what_a_candidate_leaves_behind_is_in_sight(site: Site, tmp_path: Path) -> None:
    """The service finds and ends, in its sandbox, too, what its candidate put into a session of its own."""
    unit = site.install()
    stray = "setsid sh -c ': > ready; exec sleep 600' <&- >&- 2>&- & while ! [ -e ready ]; do :; done; echo 2.0.0"
    site.offer(write_program(tmp_path / "strays", f"#!/bin/sh\n{stray}\n".encode()))
    (listed,) = unit.get("/candidates")["candidates"]
    assert (listed["eligible"], listed["code"]) == (False, "version-left-processes"), listed
    assert [process for process in unit.processes() if "sleep" in process.arguments] == []


def test_a_stranger_on_the_upgrade_address_is_in_sight(site: Site, tmp_path: Path) -> None:
    """The service sees, in its sandbox, too, that another account listens where its successor should."""
    unit = site.install()
    site.offer(shell(tmp_path / "plain", "2.0.0", "exec sleep 600"))
    upgrade = unit.ask("POST", "/upgrade").json["id"]
    unit.line(message="started a successor")
    stranger = (
        "import os, socket; os.setuid(65534); s = socket.create_server(('127.0.0.1', 8081))\nwhile True: s.accept()"
    )
    site.machine.start("python3", "-c", stranger)
    record = unit.record_when(upgrade, lambda record: record["outcome"] is not None)
    assert (record["outcome"], record["code"]) == ("aborted", "handover-bind")
    assert record["reason"] == "another account's process listens on localhost:8081"


def test_odd_arguments_arrive_as_they_were_given(site: Site) -> None:
    """What -print-unit quotes, systemd takes apart again: a program's path, and whatever a flag was given."""
    program = site.machine.root / "opt/b $HOME 2%h/tell"
    program.parent.mkdir()
    tells = "import json, sys; print(json.dumps({'message': 'told', 'arguments': sys.argv}))"
    write_program(program, f"#!/usr/bin/python3\n{tells}\n".encode())
    odd = '/a b/100%n/$HOME ${HOME}/it\'s "it"/back\\slash\\x41/;/\t\n/ä/\udcff'
    text = print_for(parse(["-upgrade-dir", odd, "-allow", "<2,>=1"], {}), Path("/opt/b $HOME 2%h/tell"))
    command = text[text.index("ExecStart=") : text.index("\n#", text.index("ExecStart="))]
    site.machine.install("tell.service", f"[Service]\nType=oneshot\n{command}\n")
    unit = Unit(site.machine, "tell.service")
    unit.systemctl("start")
    arguments = ["/opt/b $HOME 2%h/tell", "-upgrade-dir", odd, "-allow", "<2,>=1"]
    assert unit.line(message="told")["arguments"] == arguments
