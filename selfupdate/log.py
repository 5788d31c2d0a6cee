"""Log lines on standard error: a JSON object each, or a text for people with `-dev`.

A line that one process writes is one write(2), so lines of an incumbent and its
successor, which share the stream, do not mix. Whatever comes from elsewhere is
escaped: a file's name can hold a line feed.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

_OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
"""What every record has; the rest was given with `extra`."""


def configure(*, dev: bool, version: str, generation: int) -> None:
    """Write this process's log lines to standard error; each says who wrote it."""
    who = {"version": version, "pid": os.getpid(), "generation": generation}
    handler = logging.StreamHandler()
    handler.setFormatter(_ForPeople(who) if dev else _ForPrograms(who))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.DEBUG if dev else logging.INFO)


class _Formatter(logging.Formatter):
    def __init__(self, who: dict[str, object]) -> None:
        super().__init__()
        self.who = who

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        fields = {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        return fields


class _ForPrograms(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"at": at, "level": record.levelname.lower(), "message": record.getMessage(), **self.who}
        return json.dumps({**line, **self.fields(record)}, default=str)


class _ForPeople(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone().isoformat(sep=" ", timespec="milliseconds")[:23]
        fields = "".join(f" {name}={_plain(value)}" for name, value in self.fields(record).items() if value is not None)
        who = "{version} #{generation} [{pid}]".format_map(self.who)
        return f"{at} {record.levelname:<7} {who} {record.getMessage()}{fields}"


def _plain(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)
