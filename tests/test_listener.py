"""Listening sockets: bound, adopted, and shared."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Self

import pytest
from service import as_manager

from selfupdate import listener as listeners
from selfupdate import owners
from selfupdate.errors import StartError
from selfupdate.listener import Address, Listener


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


def test_a_name_without_a_file(tmp_path: Path) -> None:
    """An abstract name is reached like a path; nothing is left of it, and the kernel knows whose it is."""
    address = listeners.parse_address(f"unix:@{tmp_path}")
    assert owners.owners_of(address) == set()
    with listeners.bind(address):
        listeners.connect(address, 5).close()
        assert owners.owners_of(address) == {os.geteuid()}
    listeners.remove(address)
    listeners.bind(address).close()


class _Kernel:
    """In place of a socket to the kernel: what is asked gets these bytes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def settimeout(self, _: float) -> None:
        pass

    def send(self, _: bytes) -> None:
        pass

    def recv(self, _: int) -> bytes:
        return self._answer


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels are asked otherwise")
@pytest.mark.parametrize(
    "answer",
    [
        struct.pack("=IHHIIi", 20, 3, 2, 1, 0, -2),  # NLMSG_DONE, behind a dump that failed
        struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -95),  # NLMSG_ERROR
        b"\x14\0",
    ],
    ids=["dump fails", "error", "short"],
)
def test_a_kernel_that_cannot_say_who_listens_has_tables(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    """What is no answer does not mean that nobody listens."""
    with listeners.bind(Address("127.0.0.1", 0)) as listener:
        address = listeners.address_of(listener, Address("127.0.0.1", 0))
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", lambda *_: _Kernel(answer))
            assert owners.owners_of(address) == {os.geteuid()}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_the_umask_says_who_may_connect_to_a_path(tmp_path: Path, umask: int, mode: int) -> None:
    """Who may write to the file may connect; nobody executes it."""
    before = os.umask(umask)
    try:
        listeners.bind(Address(path=str(tmp_path / "s"))).close()
    finally:
        os.umask(before)
    assert (tmp_path / "s").stat().st_mode & 0o777 == mode


def test_several_addresses_are_bound_all_or_none(tmp_path: Path) -> None:
    """What was bound before one that cannot be is closed, a path removed; what was passed on is left alone."""
    path = Address(path=str(tmp_path / "s"))
    with listeners.bind(Address("localhost", 0)) as taken, listeners.bind(Address("localhost", 0)) as passed:
        given = Listener(passed, Address(), is_own=False)
        free = listeners.vacant(Address("localhost", 0))
        with pytest.raises(StartError, match="another process listens there"):
            listeners.listen([given, free, path, listeners.address_of(taken, Address("localhost"))])
        assert not Path(path.path).exists()
        with pytest.raises(ConnectionRefusedError):
            listeners.connect(free, 5)
        listeners.connect(listeners.address_of(passed, Address("localhost")), 5).close()
    own, unix = listeners.listen([free, path])
    with own.sock, unix.sock:
        assert (own.address, unix.address, own.is_own, unix.is_own) == (free, path, True, True)
        Listener(unix.sock, path, is_own=False).remove()
        assert Path(path.path).exists()
        unix.remove()
        assert not Path(path.path).exists()


A, B, WEB, ADMIN = Address("a", 1), Address("b", 2), Address(passed="web"), Address(passed="admin")


@pytest.mark.parametrize(
    ("asked", "passed", "served"),
    [
        ([A, B], [], [A, B]),
        ([A], ["web", "admin"], ["web", "admin"]),
        ([WEB], ["admin", "web"], ["web"]),
        ([WEB], ["web", "admin", "web"], ["web", "web"]),
        ([A, ADMIN, B, WEB], ["web", "admin", "more"], [A, "admin", B, "web"]),
    ],
)
def test_what_is_served(asked: list[Address], passed: list[str], served: list[Address | str]) -> None:
    """All that was passed on, else what was asked for; where a name is asked for, just what was asked for."""
    with contextlib.ExitStack() as sockets:
        given = [Listener(sockets.enter_context(socket.socket()), Address(), name, is_own=False) for name in passed]
        places = listeners.choose(asked, given)
        assert [place.name if isinstance(place, Listener) else place for place in places] == served
        assert len({id(place) for place in places}) == len(places)


def test_a_name_that_was_not_passed_on() -> None:
    """The text lists those that were."""
    with socket.socket() as one:
        given = [Listener(one, Address(), name, is_own=False) for name in ("web", "a\n", "web")]
        with pytest.raises(StartError) as caught:
            listeners.choose([A, ADMIN], given)
    assert str(caught.value) == r"no socket was passed on for -bind fd:admin; passed on were: fd:web, fd:a\n"
    with pytest.raises(StartError, match="asks for 34 sockets; at most 32 can be served"):
        listeners.choose([WEB, *[A] * 32], given)
    with pytest.raises(StartError, match=r"passed on were: none$"):
        listeners.choose([ADMIN], [])


_ADOPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from selfupdate import listener
try:
    adopted = listener.adopt(os.environ)
except Exception as error:
    print(type(error).__name__, error)
else:
    for one in adopted:
        print(one.address, one.name, one.is_own, os.get_inheritable(one.sock.fileno()) or one.sock.getblocking())
    print([name for name in os.environ if name.startswith("LISTEN_")])
"""


def _adopt(*fds: int, **environ: str) -> list[str]:
    root = Path(listeners.__file__).absolute().parents[1]
    said = [f"{name}={text}" for name, text in environ.items()]
    command = [*as_manager(fds), "/usr/bin/env", *said, sys.executable, "-c", _ADOPT, str(root)]
    ran = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def test_sockets_that_were_passed_on_are_adopted(tmp_path: Path) -> None:
    """Each says where it listens; it is non-blocking, not inherited any further, and the variables are gone."""
    path = tmp_path / "s"
    asked = [Address("127.0.0.1"), Address("::1"), Address(), Address(path=str(path)), Address(path=f"@{path}")]
    with contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(listeners.bind(address)) for address in asked]
        port, port_6, port_all = (one.getsockname()[1] for one in bound[:3])
        assert _adopt(*(one.fileno() for one in bound), LISTEN_FDNAMES="a:b:a::x.socket") == [
            f"127.0.0.1:{port} a False False",
            f"[::1]:{port_6} b False False",
            f":{port_all} a False False",
            f"unix:{path}  False False",
            f"unix:@{path} x.socket False False",
            "[]",
        ]
        assert _adopt(bound[0].fileno()) == [f"127.0.0.1:{port} unknown False False", "[]"]


def test_sockets_for_another_process_are_left_alone() -> None:
    """LISTEN_PID says whose they are (sd_listen_fds(3)); none may be passed on, too."""
    with listeners.bind(Address("localhost", 0)) as listener:
        assert _adopt(listener.fileno(), LISTEN_PID="1") == ["[]"]
        assert _adopt(listener.fileno(), LISTEN_FDS="0") == ["[]"]


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"LISTEN_FDS": "33"}, "LISTEN_FDS=33 is not a number of sockets from 0 to 32"),
        ({"LISTEN_FDS": "9" * 5000}, "LISTEN_FDS=99999999999999999999… is not a number of sockets from 0 to 32"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS=-1 is not a number of sockets from 0 to 32"),
        ({"LISTEN_FDS": "x"}, "LISTEN_FDS=x is not a number of sockets from 0 to 32"),
        ({"LISTEN_FDNAMES": "a:b"}, "LISTEN_FDNAMES=a:b has 2 names, and LISTEN_FDS=1"),
        (
            {"LISTEN_FDS": "2"},
            "descriptor 4, which was passed on as 'unknown', is no socket that can be served: Bad file descriptor",
        ),
    ],
)
def test_what_a_service_manager_says_must_fit(environ: dict[str, str], text: str) -> None:
    """One line says what does not."""
    with listeners.bind(Address("localhost", 0)) as listener:
        assert _adopt(listener.fileno(), **environ) == [f"StartError {text}"]


def test_what_is_passed_on_must_be_a_listener(tmp_path: Path) -> None:
    """Anything else stops the start, and its descriptor, its name and what was found are said."""
    what = "StartError descriptor 3, which was passed on as 'web',"
    comma = str(tmp_path / "a,b")
    with contextlib.ExitStack() as sockets:
        deaf, packets, named = socket.socket(), socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
        for one in (deaf, packets, named):
            sockets.enter_context(one)
        packets.bind(("127.0.0.1", 0))
        named.bind(comma)
        named.listen()
        file = sockets.enter_context(open(os.devnull, "rb"))  # noqa: PTH123 - its descriptor is what counts
        for fd, text in (
            (deaf.fileno(), "is a socket that does not listen; a connection, say, of a unit with Accept=yes"),
            (packets.fileno(), "is no stream socket; what HTTP is served on is one (ListenStream=)"),
            (named.fileno(), f"listens on unix:{comma}, which -bind cannot name; let it listen elsewhere"),
            (file.fileno(), "is no socket that can be served: Socket operation on non-socket"),
        ):
            assert _adopt(fd, LISTEN_FDNAMES="web") == [f"{what} {text}"]
