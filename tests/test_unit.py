"""The command -print-unit: a unit that systemd takes, closed as far as the flags that are given allow."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from selfupdate.errors import StartError
from selfupdate.settings import FLAGS, Flag, parse
from selfupdate.unit import unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from programs import Programs

from signed import run

PROGRAM = Path("/var/lib/self-update/bin/self-update")
PUBLIC = ("-bind", ":8443", "-token-file", "/etc/self-update/token", "-allowed-signers", "/etc/self-update/allowed")
MOST_EXPOSED = 2.0
"""What `systemd-analyze security` may say at most; it calls a service of less than 5.0 "OK"."""

Properties = dict[str, list[str]]


def properties(text: str) -> Properties:
    """Return a unit's settings by name, as lists: some stand several times."""
    found = defaultdict(list)
    for line in text.replace(" \\\n    ", " ").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[name].append(value)
    return found


def unit_for(*flags: str, program: Path = PROGRAM) -> Properties:
    return properties(unit(parse(flags, {"HOME": "/root"}), program))


def test_it_is_a_service_that_says_when_it_is_ready() -> None:
    """The manager learns from the main process alone when it serves, upgrades and stops, and starts it again."""
    found = unit_for(*PUBLIC)
    expected = {
        "Type": "notify",
        "NotifyAccess": "main",
        "ExecReload": "/bin/kill -HUP $MAINPID",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2",
        "WatchdogSec": "30s",
        "KillMode": "mixed",
        "OOMPolicy": "continue",
        "WantedBy": "multi-user.target",
    }
    assert {name: found[name] for name in expected} == {name: [value] for name, value in expected.items()}


def test_the_program_runs_with_the_flags_that_were_given() -> None:
    """And with no others; those about the call, and about a successor, are left out."""
    found = unit_for(*PUBLIC, "-print-unit", "-json", "-upgrade", "-signers-required=2")
    signers = "-allowed-signers /etc/self-update/allowed -signers-required 2"
    assert found["ExecStart"] == [f"{PROGRAM} -bind :8443 {signers} -token-file /etc/self-update/token"]
    assert unit_for()["ExecStart"] == [str(PROGRAM)]


@pytest.mark.parametrize(
    "flag", [flag for flag in FLAGS if flag.concerns != "call" and flag.name != "upgrade"], ids=lambda flag: flag.name
)
def test_each_flag_of_a_service_can_be_given(flag: Flag) -> None:
    """What was said once is said to the service at each start."""
    if flag.is_switch:
        assert unit_for(f"-{flag.name}")["ExecStart"][0].startswith(f"{PROGRAM} -{flag.name}")
        assert unit_for(f"-{flag.name}=false")["ExecStart"] == [f"{PROGRAM} -{flag.name}=false"]
        return
    odd = {"allow": "==1", "allowed-hosts": "a,b", "signer": "A" * 40, "state-dir": "/a", "upgrade-dir": "/a"}
    text = odd.get(flag.name, flag.default or "/a")
    assert unit_for(f"-{flag.name}", text)["ExecStart"] == [f"{PROGRAM} -{flag.name} {text}"]


def test_relative_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The service starts in another directory than the one that the unit was printed in."""
    monkeypatch.chdir(tmp_path)
    (command,) = unit_for("-upgrade-dir", "../new", "-token-file", "token")["ExecStart"]
    assert command == f"{PROGRAM} -upgrade-dir {tmp_path.parent}/new -token-file {tmp_path}/token"


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("/a b", '"/a b"'),
        ("/100%", '"/100%%"'),
        ("/$HOME", '"/$$HOME"'),
        ("/it's", '"/it\'s"'),
        ('/"it"', r'"/\"it\""'),
        ("/a\\b", r'"/a\\b"'),
        ("/a;b#c", '"/a;b#c"'),
        ("/a\nb\x7f", r'"/a\x0ab\x7f"'),
        ("/\udcff", r'"/\xff"'),
        ("/ä", '"/ä"'),
    ],
)
def test_odd_arguments_are_quoted(text: str, quoted: str) -> None:
    """What systemd would take for its own syntax reaches the service as it was given."""
    assert unit_for("-upgrade-dir", text)["ExecStart"] == [f"{PROGRAM} -upgrade-dir {quoted}"]


@pytest.mark.parametrize("text", ["/it's", '/"it"', "/a\\b", "/a\nb", "/\udcff", "/a "])
def test_what_systemd_takes_for_no_path_is_refused(text: str) -> None:
    """A program or a directory that it cannot name is said so, and no unit is printed that it would refuse."""
    with pytest.raises(StartError, match=r"^systemd takes no path such as ") as caught:
        unit_for(program=Path(text) / "self-update")
    assert "\n" not in str(caught.value)
    with pytest.raises(StartError):
        unit_for("-state-dir", text)


def test_systemd_s_own_paths_are_quoted() -> None:
    """A program and a directory with blanks and percent signs; a dollar sign means nothing there."""
    found = unit_for("-state-dir", "/srv/a 1%", program=Path("/opt/b $2%/self-update"))
    assert found["ExecStart"] == ['"/opt/b $2%%/self-update" -state-dir "/srv/a 1%%"']
    assert found["ReadWritePaths"] == ['"/srv/a 1%%"', '"/opt/b $2%%"']
    assert found["WorkingDirectory"] == ["/srv/a 1%%"]


@pytest.mark.parametrize(
    ("flags", "program", "expected"),
    [
        ((), PROGRAM, {"StateDirectory": ["self-update"], "ReadWritePaths": []}),
        ((), Path("/opt/it/bin/it"), {"StateDirectory": ["self-update"], "ReadWritePaths": ["/opt/it/bin"]}),
        (("-state-dir", "/srv/it"), Path("/srv/it/it"), {"StateDirectory": [], "ReadWritePaths": ["/srv/it"]}),
        (("-state-dir", "/var/lib/it"), PROGRAM, {"StateDirectory": ["it"], "ReadWritePaths": [str(PROGRAM.parent)]}),
        (
            ("-state-dir", "/var/lib/a:b"),
            PROGRAM,
            {"StateDirectory": [], "ReadWritePaths": ["/var/lib/a:b", str(PROGRAM.parent)]},
        ),
        (("-bind", "unix:/run/it/http"), PROGRAM, {"RuntimeDirectory": ["it"], "ReadWritePaths": []}),
        (("-bind", ":80,unix:/run/http,unix:@it"), PROGRAM, {"RuntimeDirectory": [], "ReadWritePaths": ["/run"]}),
        (
            ("-bind", "unix:/run/it/a", "-upgrade-bind", "unix:/run/it/b"),
            PROGRAM,
            {"RuntimeDirectory": ["it"], "ReadWritePaths": []},
        ),
    ],
    ids=[
        "default",
        "program-elsewhere",
        "state-elsewhere",
        "other-state",
        "colon",
        "unix",
        "unix-in-run",
        "unix-twice",
    ],
)
def test_only_what_must_be_written_can_be(flags: tuple[str, ...], program: Path, expected: Properties) -> None:
    """The state directory, the program's folder, and where a Unix socket is; systemd makes what it can."""
    found = unit_for(*flags, program=program)
    assert (found["ProtectSystem"], found["StateDirectoryMode"]) == (["strict"], ["0700"])
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "homes", "temporary"),
    [
        ((), "yes", "yes"),
        (("-upgrade-dir", "/home/alice/new"), "read-only", "yes"),
        (("-allowed-signers", "/root/allowed"), "read-only", "yes"),
        (("-bind", "unix:/tmp/http"), "yes", "no"),
    ],
)
def test_what_was_given_can_be_reached(flags: tuple[str, ...], homes: str, temporary: str) -> None:
    """Homes and /tmp are out of sight, unless something that was given lies there."""
    found = unit_for(*flags)
    assert (found["ProtectHome"], found["PrivateTmp"]) == ([homes], [temporary])


@pytest.mark.parametrize(
    ("bind", "bounds", "ambient"),
    [(":8443,:443", "CAP_NET_BIND_SERVICE", ["CAP_NET_BIND_SERVICE"]), (":1024", "", []), (":0", "", [])],
)
def test_a_low_port_gets_its_one_capability(bind: str, bounds: str, ambient: list[str]) -> None:
    """Any other port gets none; and with a user namespace, one that counts there alone would be of no use."""
    found = unit_for("-bind", bind)
    assert (found["CapabilityBoundingSet"], found["AmbientCapabilities"]) == ([bounds], ambient)
    assert found["PrivateUsers"] == ([] if ambient else ["yes"])


@pytest.mark.parametrize(
    ("bind", "addresses", "after"),
    [
        ("localhost:8080", ["any"], ["network.target"]),
        ("unix:/run/it/http", ["any"], ["network.target"]),
        ("localhost:8080,unix:@it", ["any"], ["network.target"]),
        ("localhost:8080,:8081", [], ["network.target"]),
        ("fd:it", [], ["network.target"]),
        ("localhost:8080,192.0.2.1:8080", [], ["network-online.target"]),
    ],
)
def test_the_network_is_as_wide_as_the_bind(bind: str, addresses: list[str], after: list[str]) -> None:
    """A service on loopback reaches nothing else; one on an address of the network starts when that is there."""
    found = unit_for("-bind", bind)
    assert (found["IPAddressDeny"], found["After"]) == (addresses, after)


@pytest.mark.parametrize(
    ("flags", "start", "stop"),
    [((), "160s", "75s"), (("-standby", "1s", "-probation", "100ms", "-drain", "1m"), "153s", "135s")],
)
def test_systemd_is_more_patient_than_the_service(flags: tuple[str, ...], start: str, stop: str) -> None:
    """It waits for what -standby, -probation and -drain allow, and something more."""
    found = unit_for(*flags)
    assert (found["TimeoutStartSec"], found["TimeoutStopSec"]) == ([start], [stop])


@pytest.mark.parametrize("flags", [(), PUBLIC, ("-bind", "unix:/run/self-update/http"), (*PUBLIC, "-bind", ":443")])
def test_systemd_finds_it_little_exposed(flags: tuple[str, ...], tmp_path: Path, tool: Callable[[str], str]) -> None:
    """`systemd-analyze security` weighs what the unit leaves open."""
    path = tmp_path / "self-update.service"
    path.write_text(unit(parse(flags, {"HOME": "/root"}), PROGRAM), encoding="utf-8")
    command = [tool("systemd-analyze"), "security", "--offline=yes", "--no-pager", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    exposure = re.search(r"Overall exposure level for self-update.service: ([0-9.]+)", ran.stdout)
    assert exposure is not None, ran
    assert float(exposure[1]) <= MOST_EXPOSED, ran.stdout


def test_systemd_takes_it_without_a_word(programs: Programs, tmp_path: Path, tool: Callable[[str], str]) -> None:
    """What the program prints is a unit that `systemd-analyze verify` finds nothing in."""
    odd = ("-upgrade-dir", "/a b;%n$HOME\"'\\", "-bind", "unix:/run/a b/%n", "-state-dir", "/var/lib/a b%n")
    for number, flags in enumerate((PUBLIC, odd)):
        ran = run(programs, *flags, "-print-unit")
        assert (ran.returncode, ran.stderr) == (0, "")
        assert str(programs.version("1.0.0")) in ran.stdout
        path = tmp_path / f"self-update-{number}.service"
        path.write_text(ran.stdout, encoding="utf-8")
        command = [tool("systemd-analyze"), "verify", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_it_is_printed_for_a_service_that_would_start(programs: Programs) -> None:
    """Flags with which the service would not start are wrong here, too."""
    ran = run(programs, "-bind", ":8443", "-print-unit")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("self-update: :8443 can be reached from other machines; give the token")


def test_a_folder_of_modules_is_no_program() -> None:
    """A service that is not one file cannot be replaced, and no unit is printed for it."""
    command = [sys.executable, "-m", "selfupdate", "-print-unit"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert (
        ran.stderr == "self-update: -print-unit needs a program that is one file: `make build` makes dist/self-update\n"
    )
