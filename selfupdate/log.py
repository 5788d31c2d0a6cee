"""Log lines on standard error: a JSON object each, or a text for people with `-dev`.

A line that one process writes is one write(2), so lines of an incumbent and its
successor, which share the stream, do not mix. Whatever comes from elsewhere is
escaped: a file's name can hold a line feed.

Two ids say what a line is about, and nobody has to pass them on: the request that
the thread answers, and the upgrade that it drives, are in its context. A thread
that is started with a copy of that context goes on with both. In a successor the
upgrade is that of the whole process, until it has become the service.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from selfupdate import __version__
from selfupdate.foreign import shown
from selfupdate.terminal import Style, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
"""What every record has; the rest was given with `extra`."""

_STYLES = {
    logging.DEBUG: Style.DIM,
    logging.INFO: Style.GREEN,
    logging.WARNING: Style.YELLOW,
    logging.ERROR: Style.RED,
    logging.CRITICAL: Style.RED,
}

_request = contextvars.ContextVar("request", default="")
_upgrade = contextvars.ContextVar("upgrade", default="")


def configure(environ: Mapping[str, str], *, dev: bool, generation: int, upgrade: str = "") -> None:
    """Write this process's log lines to standard error; each says who wrote it.

    `upgrade` is the one that the process is a part of, until this is called again without it. That is
    when the stream is another, too: a terminal, perhaps, which has colours unless `environ` forbids them.
    """
    who = {"version": __version__, "pid": os.getpid(), "generation": generation}
    terminal = Terminal.of(sys.stderr, environ)
    handler = logging.StreamHandler(terminal.stream)
    handler.setFormatter(_ForPeople(who, upgrade, terminal) if dev else _ForPrograms(who, upgrade))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.DEBUG if dev else logging.INFO)


def begin_request(given: str = "") -> None:
    """Have the lines that this thread writes from here on bear the id `given` by the client, or a new one."""
    _request.set(given or os.urandom(6).hex())


def request_id() -> str:
    """Return the id of the request that this thread does something for, or nothing."""
    return _request.get()


@contextlib.contextmanager
def upgrade(upgrade_id: str) -> Iterator[None]:
    """Have the lines that this thread writes meanwhile bear the id of an upgrade."""
    token = _upgrade.set(upgrade_id)
    try:
        yield
    finally:
        _upgrade.reset(token)


def upgrade_id() -> str:
    """Return the id of the upgrade that this thread does something for, or nothing."""
    return _upgrade.get()


def start_thread(name: str, target: Callable[..., object], *args: object) -> None:
    """Start a thread that does `target`, and goes on with the ids of this one."""
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(target, *args), name=name, daemon=True).start()


class _Formatter(logging.Formatter):
    def __init__(self, who: dict[str, object], of_process: str) -> None:
        super().__init__()
        self.who = who
        self._upgrade = of_process

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        ids = {"request": _request.get(), "upgrade": _upgrade.get() or self._upgrade}
        fields: dict[str, object] = {name: text for name, text in ids.items() if text}
        fields |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        return fields


class _ForPrograms(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"at": at, "level": record.levelname.lower(), "message": record.getMessage(), **self.who}
        return json.dumps({**line, **self.fields(record)}, default=str)


class _ForPeople(_Formatter):
    def __init__(self, who: dict[str, object], of_process: str, terminal: Terminal) -> None:
        super().__init__(who, of_process)
        self._paint = terminal.paint

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone().isoformat(sep=" ", timespec="milliseconds")[:23]
        level = self._paint(f"{record.levelname:<7}", _STYLES.get(record.levelno, Style.RED))
        who = self._paint("{version} #{generation} [{pid}]".format_map(self.who), Style.DIM)
        fields = [
            f" {self._paint(f'{name}=', Style.DIM)}{_plain(value)}"
            for name, value in self.fields(record).items()
            if value is not None
        ]
        return f"{self._paint(at, Style.DIM)} {level} {who} {shown(record.getMessage())}{''.join(fields)}"


def _plain(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)
