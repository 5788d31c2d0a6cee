"""An eye on the upgrade directory: what is dropped there is known before anybody asks for it.

The kernel tells when something has changed (inotify(7)), and then the directory is
scanned as it is for `GET /candidates`, and nothing else happens: an upgrade asks no
candidate its version that told it already. Where the kernel does not tell, there is
one scan behind the start.

Nobody waits for this. It looks while the service does nothing but serve, and rests
behind each look in proportion, so that whoever writes there all the time takes a
share of one core, and not all of it. What happens meanwhile makes one more look.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from selfupdate.errors import SelfUpdateError, StopRequestedError
from selfupdate.lifecycle import Phase
from selfupdate.system import ready

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from selfupdate.lifecycle import Lifecycle

_log = logging.getLogger(__name__)

_CALM = 0.25
"""Seconds behind the start, or a handover, in which others have more use for the processor."""
_SHORTEST_REST, _SHARE = 0.1, 9
"""Seconds between two looks, and how many times as long as the look itself: the greater counts."""

# Not IN_CREATE: what was made and is being written to is no candidate yet.
_IN_CLOSE_WRITE, _IN_ATTRIB, _IN_MOVED, _IN_CREATE, _IN_DELETE, _IN_GONE = 0x8, 0x4, 0xC0, 0x100, 0x200, 0xC00
_HERE = _IN_CLOSE_WRITE | _IN_ATTRIB | _IN_MOVED | _IN_DELETE | _IN_GONE
_ABOVE = _IN_CREATE | _IN_MOVED | _IN_GONE


class Watch:
    """Looks into the upgrade directory ahead of those who ask, in a thread of its own."""

    def __init__(
        self, directory: Path, look: Callable[[Callable[[], bool]], None], lifecycle: Lifecycle, stop_fd: int
    ) -> None:
        """Call `look` when `directory` may have changed, with what tells whether there is an upgrade by now.

        Not while one is under way, and no more when `stop_fd` is readable.
        """
        self._directory = directory
        self._look = look
        self._lifecycle = lifecycle
        self._stop_fd = stop_fd
        self._looking = threading.Lock()
        self._has_ended = False
        self._said: str | None = None
        """What went wrong last: it is said once."""

    def begin(self) -> None:
        """Look from now on: this process is the service, or will be."""
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def end(self, patience: float) -> None:
        """Look no more; wait at most `patience` seconds for the end of a look, which a stop brings about."""
        if not self._has_ended:
            self._has_ended = self._looking.acquire(timeout=patience)

    def _watch(self) -> None:
        next_look = time.monotonic() + _CALM
        while not ready([self._stop_fd], next_look) and self._serves():
            eye = self._open_eye()  # first: what happens from here on makes another look
            began = time.monotonic()
            if not self._look_once() or eye is None:
                return
            now = time.monotonic()
            next_look = now + max(_SHORTEST_REST, _SHARE * (now - began))
            try:
                ready([self._stop_fd, eye], None)
            finally:
                os.close(eye)

    def _serves(self) -> bool:
        """Wait until the service does nothing but serve; tell whether it will."""
        self._lifecycle.wait_for({Phase.RUNNING, Phase.STOPPING, Phase.RETIRED}, None)
        return self._lifecycle.phase not in {Phase.STOPPING, Phase.RETIRED}

    def _is_calm(self) -> bool:
        return self._lifecycle.phase is Phase.RUNNING

    def _look_once(self) -> bool:
        """Look; tell whether to go on."""
        with self._looking:
            try:
                self._look(self._is_calm)
            except StopRequestedError:
                return False
            except SelfUpdateError as error:  # whoever asks is told the same
                self._say(str(error))
            except Exception as error:  # noqa: BLE001 - whatever it was, the service serves
                if self._say(repr(error)):
                    _log.exception("looking at candidates met a defect")
            else:
                self._said = None
        return True

    def _say(self, why: str) -> bool:
        """Log why nothing could be seen, unless that is what was said last; tell whether it was not."""
        is_new, self._said = why != self._said, why
        if is_new:
            _log.debug("candidates could not be looked at", extra={"reason": why})
        return is_new

    def _open_eye(self) -> int | None:
        try:
            return _eye_on(self._directory)
        except (OSError, ImportError) as error:  # an interpreter may have been built without ctypes
            _log.info("candidates are looked at when somebody asks", extra={"reason": str(error)})
            return None


def _eye_on(directory: Path) -> int:
    """Return a descriptor that is readable when something has changed in a directory.

    Where that is missing, when something comes into the nearest one above it. Raises OSError.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    import ctypes  # here, where nobody waits for it

    libc = ctypes.CDLL(None, use_errno=True)
    try:
        eye: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    except AttributeError:  # another libc
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None

    def add(place: Path, events: int) -> bool:
        if libc.inotify_add_watch(eye, os.fsencode(place), events) >= 0:
            return True
        number = ctypes.get_errno()
        if number not in {errno.ENOENT, errno.ENOTDIR}:
            raise OSError(number, os.strerror(number))
        return False

    try:
        if eye < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if not add(directory, _HERE) and any(add(above, _ABOVE) for above in directory.parents):
            add(directory, _HERE)  # it may have come before that was seen
    except OSError:
        with contextlib.suppress(OSError):
            os.close(eye)
        raise
    return eye
