"""What a stream of this process is to whoever reads it: a person at a terminal, or a program."""

import enum
import os
from collections.abc import Mapping
from typing import NamedTuple, TextIO

from selfupdate import system

_COLUMNS = 80
"""Of a terminal that does not tell how wide it is."""


class Style(enum.StrEnum):
    """How text is set off: parameters of SGR (ECMA-48, section 8.3.117)."""

    BOLD = "1"
    DIM = "2"
    RED = "31"
    GREEN = "32"
    YELLOW = "33"


class Terminal(NamedTuple):
    """What is known of one stream."""

    stream: TextIO
    has_reader: bool
    """Whether it is a terminal: a person reads it."""
    redraws: bool
    """Whether a line on it can be written over, by escape codes."""
    has_colours: bool

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str]) -> "Terminal":
        """Look at a stream; `environ` says what the person wants (https://no-color.org) and has (`TERM`)."""
        has_reader = stream.isatty()
        redraws = has_reader and system.obeys_escape_codes(stream.fileno(), environ)
        return cls(stream, has_reader, redraws, has_colours=redraws and not environ.get("NO_COLOR"))

    @property
    def columns(self) -> int:
        """How wide it is now."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or _COLUMNS
        except OSError:
            return _COLUMNS

    def paint(self, text: str, style: Style) -> str:
        """Return `text` in a style, where there are colours."""
        return f"\x1b[{style}m{text}\x1b[0m" if self.has_colours else text
