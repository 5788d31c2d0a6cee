"""Running other programs: whatever they do, it ends, and nothing of them is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from service import PATIENCE, wait_for_end

from selfupdate import notify, process
from selfupdate.errors import StopRequestedError
from selfupdate.posix import Guard, spawn
from selfupdate.process import Output, capture, ending


def _run(script: str, *, time_limit: float = PATIENCE, size_limit: int = 4096, stop: bool = False) -> Output:
    stop_out, stop_in = socket.socketpair()
    with stop_out, stop_in:
        if stop:
            stop_in.send(b"\0")
        return _capture(script, time_limit, size_limit, stop_out.fileno())


def _capture(script: str, time_limit: float, size_limit: int, stop_fd: int) -> Output:
    return capture(
        ["/bin/sh", "-c", script],
        {"PATH": "/usr/bin:/bin"},
        Path("/"),
        time_limit=time_limit,
        size_limit=size_limit,
        stop_fd=stop_fd,
    )


def test_capture_returns_what_was_printed() -> None:
    """Both streams, the status, nothing to read, and only the environment that was given."""
    output = _run("cat; echo out; echo err >&2; env | grep -c HOME; exit 5")
    assert output == Output(5, b"out\n0\n", b"err\n")


def test_capture_says_by_which_signal_it_ended() -> None:
    """A negative status is a signal's number."""
    assert _run("kill -KILL $$").status == -signal.SIGKILL
    assert ending(-signal.SIGKILL) == "was killed by SIGKILL"
    assert ending(-64) == "was killed by SIGRTMAX"
    assert ending(3) == "ended with status 3"


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("sleep 600", process.TooSlowError),
        ("trap '' TERM; sleep 600", process.TooSlowError),
        ("kill -STOP $$", process.TooSlowError),
        ("exec >&- 2>&-; sleep 600", process.TooSlowError),
        ("yes", process.TooMuchOutputError),
        ("sleep 600 & exit 0", process.LeftProcessesError),
    ],
)
def test_capture_ends_whatever_it_started(script: str, error: type[Exception], tmp_path: Path) -> None:
    """The whole group is killed: the children, too."""
    pids = tmp_path / "pids"
    with pytest.raises(error):
        _run(f"echo $$ > {pids}; {script}", time_limit=2.0 if error is process.TooSlowError else PATIENCE)
    leader = int(pids.read_text(encoding="utf-8"))
    wait_for_end(leader)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _group(entry) == leader:
            wait_for_end(int(entry.name))  # it was killed, and may take a moment to be gone


def test_capture_takes_what_came_while_nobody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is over when the program's end is seen; what it had printed by then is there, and so is its end."""
    monkeypatch.setattr(process, "LEFTOVER_TIME", -1.0)
    assert _run("echo out; echo err >&2") == Output(0, b"out\n", b"err\n")
    with pytest.raises(process.LeftProcessesError):
        _run("sleep 600 & exit 0")


@pytest.mark.parametrize("stray", [": > ready; exec sleep 600", "setsid sh -c ': > ready; exec sleep 600' & wait"])
def test_capture_ends_what_left_its_group(stray: str, tmp_path: Path) -> None:
    """A process in a session of its own is known by the mark that it inherited, and so is what that one started."""
    stop_out, stop_in = socket.socketpair()
    home = f"HOME={tmp_path}"
    with stop_out, stop_in, pytest.raises(process.LeftProcessesError):
        capture(
            ["/bin/sh", "-c", 'exec >&- 2>&-; setsid sh -c "$0" & while ! [ -e ready ]; do :; done', stray],
            {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            tmp_path,
            time_limit=PATIENCE,
            size_limit=4096,
            stop_fd=stop_out.fileno(),
            mark=home,
        )
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                assert home.encode() not in (entry / "environ").read_bytes().split(b"\0")


def _group(entry: Path) -> int:
    try:
        fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[2]) if fields[0] != "Z" else 0


def test_capture_ends_with_a_stop() -> None:
    """Nobody waits for a program when the process is to stop."""
    with pytest.raises(StopRequestedError):
        _run("sleep 600", stop=True)


def test_capture_keeps_the_beginning_of_much_on_standard_error() -> None:
    """Standard error is read to its end, and bounded."""
    output = _run("yes e | head -c 1000000 >&2; echo 1.0.0", size_limit=100)
    assert output.stdout == b"1.0.0\n"
    assert len(output.stderr) == 100


def test_spawn_passes_descriptors_in_order(tmp_path: Path) -> None:
    """They are 3, 4, … whatever their numbers are here, also where these overlap; LISTEN_PID is the child's own."""
    out = tmp_path / "out"
    pipes = [os.pipe() for _ in range(3)]
    script = f'echo "$LISTEN_FDS $LISTEN_PID $$" > {out}; echo a >&3; echo b >&4; echo c >&5'
    child = spawn(["/bin/sh", "-c", script], {"PATH": "/bin"}, [write for _, write in pipes], listeners=2)
    assert child.wait(time.monotonic() + PATIENCE)
    assert child.end(0) == 0
    assert out.read_text(encoding="utf-8") == f"2 {child.pid} {child.pid}\n"
    for (read, write), text in zip(pipes, (b"a\n", b"b\n", b"c\n"), strict=True):
        os.close(write)
        assert os.read(read, 10) == text
        os.close(read)


def test_spawn_passes_nothing_else() -> None:
    """No other descriptor of this process reaches the child."""
    read, write = os.pipe()
    with socket.socket() as other:
        os.set_inheritable(other.fileno(), False)
        child = spawn(["/bin/sh", "-c", "ls /proc/$$/fd >&3"], {"PATH": "/bin:/usr/bin"}, [write], listeners=0)
        os.close(write)
        with os.fdopen(read) as out:
            fds = [int(fd) for fd in out.read().split()]
        child.end(PATIENCE)
    assert [fd for fd in fds if fd < 10] == [0, 1, 2, 3]


def test_end_waits_for_one_that_leaves_and_kills_one_that_does_not() -> None:
    """`terminate` tells it to leave; `end` gives it a while."""
    read, write = os.pipe()
    ready = "echo > /proc/self/fd/3"
    leaves = spawn(
        ["/bin/sh", "-c", f"trap 'exit 4' TERM; {ready}; while :; do sleep 0.01; done"], {}, [write], listeners=0
    )
    os.read(read, 1)
    leaves.terminate()
    assert leaves.end(PATIENCE) == 4
    assert leaves.end(PATIENCE) == 4
    stays = spawn(["/bin/sh", "-c", f"trap '' TERM; {ready}; while :; do sleep 0.01; done"], {}, [write], listeners=0)
    os.read(read, 1)
    stays.terminate()
    assert stays.end(0.1) == -signal.SIGKILL
    os.close(read)
    os.close(write)


def _streams() -> tuple[dict[int, int], dict[int, int]]:
    """Make pipes for a child's output and error; return the writing and the reading ends."""
    pipes = {stream: os.pipe() for stream in (1, 2)}
    return {stream: write for stream, (_, write) in pipes.items()}, {
        stream: read for stream, (read, _) in pipes.items()
    }


def test_a_guard_passes_on_what_a_group_writes_later(capfd: pytest.CaptureFixture[str]) -> None:
    """It begins when this process has left the group to it, and ends with the last who can write."""
    writers, readers = _streams()
    read, write = os.pipe()
    child = spawn(
        ["/bin/sh", "-c", "read -r word <&3; echo out; echo err >&2"],
        {"PATH": "/bin:/usr/bin"},
        [read],
        streams=writers,
    )
    guard = Guard(child.pid, readers)
    guard.release()
    guard.leave()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.killpg(guard.pid, number)  # as a service manager does that ends a whole service
    os.write(write, b"\n")
    assert child.end(PATIENCE) == 0
    for fd in (*writers.values(), *readers.values(), read, write):
        os.close(fd)
    os.waitpid(guard.pid, 0)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("out\n", "err\n")


@pytest.mark.parametrize("is_released", [True, False])
def test_a_guard_kills_a_group_whose_parent_died(is_released: bool) -> None:  # noqa: FBT001 - data
    """It acts when this process is gone, and not when it had let go before."""
    read, write = os.pipe()
    writers, readers = _streams()
    parent = os.fork()
    if not parent:
        child = spawn(["/bin/sh", "-c", "sleep 600 & wait"], {"PATH": "/bin:/usr/bin"}, [])
        guard = Guard(child.pid, readers)
        if is_released:
            guard.release()
        os.write(write, str(child.pid).encode())
        os._exit(0)
    os.waitpid(parent, 0)
    pid = int(os.read(read, 20))
    if is_released:
        assert _group(Path(f"/proc/{pid}")) == pid
        os.killpg(pid, signal.SIGKILL)
    wait_for_end(pid)
    for fd in (read, write, *writers.values(), *readers.values()):
        os.close(fd)


def test_what_cannot_be_executed_raises() -> None:
    """No half-started child."""
    with pytest.raises(FileNotFoundError):
        spawn(["/no/such/program"], {}, [])


def test_a_notification_is_taken_from_the_process_that_is_expected_alone() -> None:
    """The kernel says who sent it: others' datagrams are dropped."""
    receiver = notify.Receiver()
    environ = {"NOTIFY_SOCKET": receiver.address}
    notify.send(environ, READY="1")
    child = os.fork()
    if not child:
        notify.send(environ, READY="1", STATUS="from = the child")
        os._exit(0)
    os.waitpid(child, 0)
    notify.send(environ, READY="0")
    assert receiver.receive(child) == {"READY": "1", "STATUS": "from = the child"}
    assert receiver.receive(child) is None
    receiver.close()
    notify.send(environ, READY="1")  # nobody listens any more, and nothing happens


def test_no_manager_is_told_where_there_is_none() -> None:
    """A process that nobody waits for says nothing."""
    notify.send({}, READY="1")
    notify.send({"NOTIFY_SOCKET": "vsock:2:1234"}, READY="1")
