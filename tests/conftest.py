"""Fixtures: what is built and started for the tests, and the figures that a run prints at its end."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from programs import Programs
from service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_FIGURES = pytest.StashKey[list[str]]()


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


@pytest.fixture
def figure(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Print a measured figure at the end of the run."""
    return pytestconfig.stash.setdefault(_FIGURES, []).append


@pytest.fixture
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
