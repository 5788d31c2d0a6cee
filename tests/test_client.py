"""The commands for scripts: -status, -apply and -rollback ask the running service."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from programs import shell
from service import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable

    from programs import Programs
    from service import Service

pytestmark = pytest.mark.slow

FLAGS = ("-probation", "100ms", "-drain", "2s")
PHASES = ("CHOOSING", "STAGING", "STARTING", "PROBING", "REPLACING", "PROBATION", "RETIRED")


def _ask(service: Service, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(service.program), "-state-dir", str(service.state_dir), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_upgrading_and_going_back_from_a_script(start: Callable[..., Service], programs: Programs) -> None:
    """Each phase is printed, then the outcome; the status says how things stand in between."""
    service = start(*FLAGS)
    host, port = service.address
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    said = _ask(service, "-status")
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith(f"1.0.0 on {host}:{port}: RUNNING, process {service.process.pid}\n")
    assert said.stdout.endswith("an upgrade would take new\n")

    for flag, journey in (("-apply", "1.0.0 -> 1.1.0"), ("-rollback", "1.1.0 -> 1.0.0")):
        ran = _ask(service, flag)
        assert (ran.returncode, ran.stderr) == (0, "")
        *phases, outcome = ran.stdout.splitlines()
        assert [re.sub("^[^ ]+Z ", "", line) for line in phases] == list(PHASES)
        assert outcome == f"committed: {journey}"
        version = journey.split()[-1]
        status = json.loads(_ask(service, "-status", "-json").stdout)
        assert (status["version"], status["installed"]) == (version, {"version": version, "reason": None})
        assert _ask(service, "-version").stdout == f"{version}\n"

    again = _ask(service, "-apply")
    assert (again.returncode, again.stdout) == (0, "up to date: 1.0.0\n")
    assert "was rolled back from at " in _ask(service, "-status").stdout


def test_an_upgrade_that_fails_ends_with_1_and_the_reason(start: Callable[..., Service]) -> None:
    """A script can tell, and a person, too."""
    service = start(*FLAGS)
    shell(service.upgrade_dir / "bad", "2.0.0", "exit 3")
    service.line(message="serving")
    ran = _ask(service, "-apply")
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[-1] == "aborted: 1.0.0 -> 2.0.0: bad ended with status 3 before it stood by"


def test_there_is_nothing_to_go_back_to(start: Callable[..., Service]) -> None:
    """A first version has no previous one."""
    service = start(*FLAGS)
    service.line(message="serving")
    ran = _ask(service, "-rollback")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("self-update: There is no version to go back to")


def test_no_service_answers(start: Callable[..., Service]) -> None:
    """One line says where it was looked for, and what to do."""
    service = start(*FLAGS)
    port = service.address[1]
    service.stop()
    ran = _ask(service, "-status")
    assert (ran.returncode, ran.stdout) == (1, "")
    why = "(Connection refused); start it, or name its -state-dir or -bind"
    assert ran.stderr == f"self-update: no service answers on localhost:{port} {why}\n"
