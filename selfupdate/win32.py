"""The calls of Windows that Python has no name for: jobs, events, and who listens on a port.

Each is described by Microsoft's documentation page of the same name. What fails raises OSError.
"""

from __future__ import annotations

import ctypes
import msvcrt
import socket
import struct
import sys
from ctypes import wintypes
from typing import Self

assert sys.platform == "win32"  # for those who read types: none of this is there

_kernel = ctypes.WinDLL("kernel32", use_last_error=True)
_ntdll = ctypes.WinDLL("ntdll")
_iphlpapi = ctypes.WinDLL("iphlpapi")
for _name in ("CreateJobObjectW", "OpenProcess", "CreateEventW", "OpenEventW", "CreateFileW"):
    getattr(_kernel, _name).restype = wintypes.HANDLE

_INFINITE = 0xFFFFFFFF
_INVALID_HANDLE = ctypes.c_void_p(-1).value
_CTRL_BREAK_EVENT = 1
_ALREADY_EXISTS, _INSUFFICIENT_BUFFER = 183, 122
SHARING_VIOLATION = 32
"""The error of a file that another has opened in a way that excludes this one (System Error Codes)."""

_SYNCHRONIZE, _EVENT_MODIFY_STATE = 0x100000, 0x2
_PROCESS_QUERY_INFORMATION, _PROCESS_SET_QUOTA, _PROCESS_TERMINATE, _PROCESS_SUSPEND_RESUME = 0x400, 0x100, 0x1, 0x800
_GENERIC_READ_WRITE, _FILE_SHARE_READ, _OPEN_ALWAYS = 0xC0000000, 0x1, 4
_EXTENDED_LIMIT_INFORMATION = 9
_TCP_TABLE_OWNER_PID_LISTENER = 3
_ENABLE_VIRTUAL_TERMINAL_PROCESSING = 0x4


def _check(result: int | None) -> int:
    """Return what a call returned, unless that means that it failed."""
    if not result or result == _INVALID_HANDLE:
        raise ctypes.WinError(ctypes.get_last_error())
    return result


class Handle:
    """A handle of the kernel's, closed in the end."""

    def __init__(self, value: int | None) -> None:
        """Take what a call returned."""
        self.value = wintypes.HANDLE(_check(value))

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is signalled; tell whether it is (WaitForSingleObject)."""
        milliseconds = _INFINITE if seconds is None else int(seconds * 1000)
        return bool(_kernel.WaitForSingleObject(self.value, milliseconds) == 0)

    def close(self) -> None:
        """Close it."""
        if self.value.value:
            _kernel.CloseHandle(self.value)
            self.value = wintypes.HANDLE(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_process(pid: int, access: int = _SYNCHRONIZE) -> Handle:
    """Return a handle of the process `pid`, by which its end can be waited for."""
    return Handle(_kernel.OpenProcess(access, False, pid))


class _BasicLimits(ctypes.Structure):
    _fields_ = (  # JOBOBJECT_BASIC_LIMIT_INFORMATION
        ("per_process_user_time", ctypes.c_int64),
        ("per_job_user_time", ctypes.c_int64),
        ("flags", wintypes.DWORD),
        ("minimum_working_set", ctypes.c_size_t),
        ("maximum_working_set", ctypes.c_size_t),
        ("active_processes", wintypes.DWORD),
        ("affinity", ctypes.c_size_t),
        ("priority_class", wintypes.DWORD),
        ("scheduling_class", wintypes.DWORD),
    )


class _ExtendedLimits(ctypes.Structure):
    _fields_ = (  # JOBOBJECT_EXTENDED_LIMIT_INFORMATION
        ("basic", _BasicLimits),
        ("io_counters", ctypes.c_uint64 * 6),
        ("memory", ctypes.c_size_t * 4),
    )


class Job:
    """A group of processes, to which each belongs that one of them starts (Job Objects)."""

    KILL_ON_CLOSE = 0x2000
    """When the last handle of the job is closed, as at the end of its owner, its processes are killed."""
    SILENT_BREAKAWAY = 0x1000
    """What its processes start from now on does not belong to it."""

    def __init__(self, limits: int) -> None:
        """Make one; `limits` of the above."""
        self._handle = Handle(_kernel.CreateJobObjectW(None, None))
        self.limit(limits)

    def limit(self, limits: int) -> None:
        """Set other limits."""
        wanted = _ExtendedLimits()
        wanted.basic.flags = limits
        size = ctypes.sizeof(wanted)
        _check(
            _kernel.SetInformationJobObject(
                self._handle.value, _EXTENDED_LIMIT_INFORMATION, ctypes.byref(wanted), wintypes.DWORD(size)
            )
        )

    def take_in(self, pid: int) -> None:
        """Have the process `pid`, which was started suspended, belong to it, and run.

        The thread's handle, by which ResumeThread would do it, is not handed out by `subprocess`:
        NtResumeProcess resumes all threads of a process, of which it has one.
        """
        access = _PROCESS_SET_QUOTA | _PROCESS_TERMINATE | _PROCESS_SUSPEND_RESUME
        with open_process(pid, access) as process:
            _check(_kernel.AssignProcessToJobObject(self._handle.value, process.value))
            _ntdll.NtResumeProcess(process.value)

    def holds(self, pid: int) -> bool:
        """Tell whether the process `pid` lives and belongs to it (IsProcessInJob)."""
        answer = wintypes.BOOL()
        if not self._handle.value.value:
            return False  # none would mean any
        try:
            with open_process(pid, _PROCESS_QUERY_INFORMATION) as process:
                _check(_kernel.IsProcessInJob(process.value, self._handle.value, ctypes.byref(answer)))
        except OSError:  # it has ended, or is somebody else's
            return False
        return bool(answer.value)

    def kill(self) -> None:
        """Kill its processes (TerminateJobObject)."""
        _kernel.TerminateJobObject(self._handle.value, 1)

    def close(self) -> None:
        """Let go of it."""
        self._handle.close()


def create_event(name: str) -> Handle | None:
    """Return a new event, or None where somebody else made one of that `name` (CreateEventW)."""
    ctypes.set_last_error(0)
    try:
        event = Handle(_kernel.CreateEventW(None, True, False, name))
    except OSError:  # another account's
        return None
    if ctypes.get_last_error() != _ALREADY_EXISTS:
        return event
    event.close()
    return None


def signal_event(name: str) -> None:
    """Signal the event of that `name` (SetEvent)."""
    with Handle(_kernel.OpenEventW(_EVENT_MODIFY_STATE, False, name)) as event:
        _check(_kernel.SetEvent(event.value))


def press_ctrl_break(group: int) -> None:
    """Send Ctrl-Break to the processes of a group on this process's console (GenerateConsoleCtrlEvent).

    os.kill does that, too, and where it fails goes on to kill the process.
    """
    _check(_kernel.GenerateConsoleCtrlEvent(_CTRL_BREAK_EVENT, group))


def open_exclusively(path: str) -> int:
    """Return a handle of a file, made where it is missing, that nobody else can write to meanwhile (CreateFileW).

    Raises OSError, with `winerror` SHARING_VIOLATION where somebody else can.
    """
    return _check(
        _kernel.CreateFileW(
            path,
            wintypes.DWORD(_GENERIC_READ_WRITE),
            _FILE_SHARE_READ,
            None,
            _OPEN_ALWAYS,
            0,
            None,
        )
    )


def write(handle: int, content: bytes) -> None:
    """Write to a pipe's handle (WriteFile)."""
    written = wintypes.DWORD()
    _check(
        _kernel.WriteFile(wintypes.HANDLE(handle), content, wintypes.DWORD(len(content)), ctypes.byref(written), None)
    )


def obey_escape_codes(fd: int) -> bool:
    """Have the console at `fd` do what escape codes say; tell whether it does (SetConsoleMode)."""
    mode = wintypes.DWORD()
    try:
        console = wintypes.HANDLE(msvcrt.get_osfhandle(fd))
        _check(_kernel.GetConsoleMode(console, ctypes.byref(mode)))
        _check(_kernel.SetConsoleMode(console, wintypes.DWORD(mode.value | _ENABLE_VIRTUAL_TERMINAL_PROCESSING)))
    except OSError:  # it is older than Windows 10, or no console
        return False
    return True


def listeners() -> list[tuple[bytes, int, int]]:
    """Return the address, the port and the process id of each TCP socket that listens (GetExtendedTcpTable)."""
    found = []
    # MIB_TCPROW_OWNER_PID; MIB_TCP6ROW_OWNER_PID. A port is in the network's order, in the first half of its word.
    rows = {socket.AF_INET: struct.Struct("=4x4sHxx8xI"), socket.AF_INET6: struct.Struct("=16s4xHxx16x4x4x4xI")}
    for family, row in rows.items():
        table = _table(int(family))
        (count,) = struct.unpack_from("=I", table)
        for number in range(count):
            address, port, pid = row.unpack_from(table, 4 + number * row.size)
            found.append((address, socket.ntohs(port), pid))
    return found


def _table(family: int) -> bytes:
    """Return the system's table, which may grow between the question after its size and that after itself."""
    size = wintypes.DWORD(0)
    table = ctypes.create_string_buffer(1)
    while error := _iphlpapi.GetExtendedTcpTable(
        table, ctypes.byref(size), False, family, _TCP_TABLE_OWNER_PID_LISTENER, 0
    ):
        if error != _INSUFFICIENT_BUFFER:
            raise ctypes.WinError(error)
        table = ctypes.create_string_buffer(size.value)
    return table.raw
