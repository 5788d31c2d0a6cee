"""A terminal for the tests: what a command that runs in it has on its screen."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import re
import struct
import subprocess
import termios
import threading
from typing import TYPE_CHECKING, Self

from service import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_TOKEN = re.compile(r"\x1b\[([0-9;]*)([a-zA-Z])|(\x1b(?:\[[0-9;]*)?\Z)|\x1b|.", re.DOTALL)


class Screen:
    """As many columns as there are, and lines without end. It knows few codes, and each other one is an error."""

    def __init__(self, columns: int) -> None:
        self.lines = [""]
        self.has_wrapped = False
        self.styles: set[str] = set()
        self.overwritten: list[str] = []
        """What each line held before it was written over."""
        self.begun = ""
        """What a code begins with whose rest has not come yet."""
        self._columns = columns
        self._column = 0

    def feed(self, text: str) -> None:
        text, self.begun = self.begun + text, ""
        for token in _TOKEN.finditer(text):
            if token[3]:
                self.begun = token[3]
            elif token[2] == "m":
                self.styles.add(token[1])
            elif token[0] == "\x1b[K":
                self.lines[-1] = self.lines[-1][: self._column]
            elif token[0] == "\r":
                self.overwritten.append(self.lines[-1])
                self._column = 0
            elif token[0] == "\n":
                self.lines.append("")
                self.has_wrapped = self.has_wrapped or self._column != 0
            else:
                assert token[0].isprintable(), f"{token[0]!r} in {text!r}"
                self._put(token[0])

    def _put(self, letter: str) -> None:
        if self._column == self._columns:
            self.lines.append("")
            self._column = 0
            self.has_wrapped = True
        line = self.lines[-1]
        self.lines[-1] = line[: self._column] + letter + line[self._column + 1 :]
        self._column += 1

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Command:
    """A command that runs in a terminal of its own."""

    def __init__(self, setsid: str, command: Sequence[str], columns: int, environ: Mapping[str, str]) -> None:
        self.screen = Screen(columns)
        self._news = threading.Condition()
        self._master, self._slave = os.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._modes = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            [setsid, "--ctty", *command],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env={**os.environ, **environ},
        )
        self._failure: BaseException | None = None
        self._is_closed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while chunk := os.read(self._master, 4096):
                with self._news:
                    try:
                        self.screen.feed(decoder.decode(chunk))
                    except AssertionError as error:
                        self._failure = error
                    self._news.notify_all()

    def until(self, is_so: Callable[[Screen], object]) -> None:
        """Wait until the screen is as `is_so` says."""
        with self._news:
            self._news.wait_for(lambda: is_so(self.screen) or self._failure, PATIENCE)
            assert is_so(self.screen), self.screen.lines

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def end(self) -> int:
        """Wait until it has ended; return its status. It has left the terminal as it found it."""
        status = self.process.wait(PATIENCE)
        assert termios.tcgetattr(self._slave) == self._modes
        self._close()
        if self._failure:
            raise self._failure
        assert (self.screen.lines[-1], self.screen.begun) == ("", ""), "the prompt begins a line"
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        self._close()

    def _close(self) -> None:
        """Read to the end, which comes when nobody has the terminal open any more, and close it."""
        if not self._is_closed:
            self._is_closed = True
            os.close(self._slave)
            self._reader.join(PATIENCE)
            os.close(self._master)
