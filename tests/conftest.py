"""Fixtures: what is built and started for the tests, and the figures that a run prints at its end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import build
import pytest
from keys import OpenPgpKeys, SshKeys
from programs import Programs
from service import Service
from signed import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_FIGURES = pytest.StashKey[list[str]]()


def pytest_sessionstart() -> None:
    """Refuse to test one Python while another one runs the services."""
    first_line = build.SHEBANG.decode().removeprefix("#!").split()
    say = [*first_line, "-c", "import sys; print(sys.version, end='')"]
    found = subprocess.run(say, stdout=subprocess.PIPE, text=True, check=False).stdout
    if found != sys.version:
        raise pytest.UsageError(f"the tests run under Python {sys.version}, and the services would under {found!r}")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Programs that are built for this run."""
    return Programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def start(programs: Programs, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services, each ended with the test: version 1.0.0 unless another program is given."""
    services: list[Service] = []

    def start(*flags: str, program: Path | None = None) -> Service:
        services.append(Service(program or programs.version("1.0.0"), tmp_path, *flags))
        return services[-1]

    yield start
    for service in services:
        service.kill()


@pytest.fixture(scope="session")
def ssh_keys(tmp_path_factory: pytest.TempPathFactory) -> SshKeys:
    """SSH keys that are made for this run."""
    return SshKeys(tmp_path_factory.mktemp("ssh"))


@pytest.fixture
def ssh(ssh_keys: SshKeys, tool: Callable[[str], str]) -> SshKeys:
    """SSH keys, where there is a tool to make them."""
    tool("ssh-keygen")
    return ssh_keys


@pytest.fixture(scope="session")
def open_pgp_keys() -> Iterator[OpenPgpKeys]:
    """OpenPGP keys that are made for this run."""
    with OpenPgpKeys() as keys:
        yield keys


@pytest.fixture
def gpg(open_pgp_keys: OpenPgpKeys, tool: Callable[[str], str]) -> OpenPgpKeys:
    """OpenPGP keys, where there are tools to make and to check them."""
    for name in ("gpg", "gpgconf", "gpgv"):
        tool(name)
    return open_pgp_keys


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Site]:
    """Make a candidate, and nothing that says whom to trust."""
    stop_out, stop_in = socket.socketpair()
    with stop_out, stop_in:
        yield Site(tmp_path, stop_out.fileno())


@pytest.fixture
def site(bare: Site, ssh: SshKeys) -> Site:
    """Make a candidate that alice, who may, has signed."""
    bare.allow(ssh.key("alice").line())
    bare.signature.write_bytes(ssh.key("alice").sign(bare.content))
    return bare


@pytest.fixture
def figure(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Print a measured figure at the end of the run."""
    return pytestconfig.stash.setdefault(_FIGURES, []).append


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Find a program that the tests use: where `CI` is set, a missing one fails the test."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is not None:
            return path
        message = f"{name} is not installed; .ci/run installs what the tests use"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)

    return find


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures."""
    figures = config.stash.get(_FIGURES, [])
    if figures:
        terminalreporter.section("measured in this run")
        for text in figures:
            terminalreporter.write_line(text)
