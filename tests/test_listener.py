"""Listening sockets: bound, adopted, and shared."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from selfupdate import listener as listeners
from selfupdate.errors import StartError
from selfupdate.listener import Address

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("text", ["localhost:0", "127.0.0.1:0", ":0", "0.0.0.0:0", "[::1]:0"])
def test_an_address_can_be_bound_and_reached(text: str) -> None:
    """Port 0 takes a free one; every address of the machine is reached by loopback."""
    if ":" in text.rpartition(":")[0] and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    asked = listeners.parse_address(text)
    with listeners.bind(asked) as listener:
        address = listeners.address_of(listener, asked)
        assert address.port
        assert not listener.getblocking()
        listeners.connect(address, 5).close()


def test_every_address_means_both_families() -> None:
    """`:8080` is reached by IPv4 and by IPv6."""
    with listeners.bind(Address()) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            listeners.connect(Address(host, port), 5).close()


def test_an_address_that_is_taken() -> None:
    """The text names the address and what to do; nothing can bind beside a listener."""
    with listeners.bind(Address("localhost", 0)) as listener:
        address = listeners.address_of(listener, Address("localhost", 0))
        with pytest.raises(StartError, match=rf"cannot listen on localhost:{address.port}: another process listens"):
            listeners.bind(address)
        with pytest.raises(OSError, match="in use"):
            listeners.vacant(address)


def test_a_vacant_port_is_bindable() -> None:
    """Port 0 becomes a port that is free."""
    address = listeners.vacant(Address("localhost", 0))
    assert address.port
    listeners.bind(address).close()


def test_a_unix_socket(tmp_path: Path) -> None:
    """A path is bound, taken over from a dead process, and never from a live one or from a file."""
    address = Address(path=str(tmp_path / "s"))
    with listeners.bind(address):
        listeners.connect(address, 5).close()
        with pytest.raises(StartError, match="another process listens there"):
            listeners.bind(address)
    listeners.bind(address).close()  # the path is still there, and nobody listens
    (tmp_path / "s").unlink()
    (tmp_path / "s").write_text("precious", encoding="utf-8")
    with pytest.raises(StartError, match="a file that is no socket is there"):
        listeners.bind(address)
    assert (tmp_path / "s").read_text(encoding="utf-8") == "precious"


_ADOPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from selfupdate import listener
os.environ["LISTEN_PID"] = os.environ["LISTEN_PID"].replace("own", str(os.getpid()))
try:
    adopted = listener.adopt(os.environ)
except Exception as error:
    print(type(error).__name__, error)
else:
    print([os.get_inheritable(one.fileno()) or one.getblocking() for one in adopted], "LISTEN_FDS" in os.environ)
"""


def _adopt(fd: int, pid: str = "own") -> str:
    root = os.path.dirname(os.path.dirname(os.path.abspath(listeners.__file__)))  # noqa: PTH100, PTH120 - a text
    script = f'exec {sys.executable} -c "$0" {root} 3<&{fd}'
    ran = subprocess.run(
        ["/bin/bash", "-c", script, _ADOPT],
        env={"LISTEN_FDS": "1", "LISTEN_PID": pid},
        pass_fds=[fd],
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.strip()


def test_a_socket_that_was_passed_on_is_adopted() -> None:
    """It is the third descriptor, non-blocking, not inherited any further, and the variables are gone."""
    with listeners.bind(Address("localhost", 0)) as listener:
        assert _adopt(listener.fileno()) == "[False] False"


def test_sockets_for_another_process_are_left_alone() -> None:
    """LISTEN_PID says whose they are (sd_listen_fds(3))."""
    with listeners.bind(Address("localhost", 0)) as listener:
        assert _adopt(listener.fileno(), "1") == "[] False"


def test_what_is_passed_on_must_be_a_listener() -> None:
    """Anything else stops the start, and says what was found."""
    with socket.socket() as deaf:
        assert _adopt(deaf.fileno()) == "StartError descriptor 3 of LISTEN_FDS=1 is a socket that does not listen"
    with open(os.devnull, "rb") as file:  # noqa: PTH123 - its descriptor is what counts
        assert _adopt(file.fileno()).startswith("StartError descriptor 3 of LISTEN_FDS=1 is no socket: ")
