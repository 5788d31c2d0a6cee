"""The head of a request: where it ends, what has no place in it, and its fields.

Whatever makes the end of a request uncertain is refused (RFC 9112, section 6): two
parties that see different ends see different requests. Only a head that is
well-formed as a whole is taken apart, so that taking it apart is simple.
"""

from __future__ import annotations

import re

LONGEST_LINE = 65536
MOST_FIELDS = 100

# What has no place in a head: control characters, a CR that ends no line, and a line that goes on with white
# space. http.server's parser would take each for something else than others do.
_END = re.compile(rb"\r?\n\r?\n")
_NOT_IN_A_HEAD = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|\n[ \t]")
_FIELDS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*\r?\n)*\r?\n")
_REQUEST_LINE = re.compile(rb"[A-Z]+ [!-~]+ HTTP/[1-9]\.[0-9]\r?\n")
_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*([0-9]{1,9})[ \t]*\r?$")
_EXPECTS = re.compile(rb"(?im)^expect:[ \t]*100-continue")


def end_of(received: bytes | bytearray) -> int | None:
    """Return how many bytes the head has; None where its end has not arrived."""
    end = _END.search(received)
    return end.end() if end else None


def length_of_body(head: bytes | bytearray, limit: int) -> int:
    """Return how many bytes come behind a head without being asked for, as far as it tells; none above `limit`."""
    length = _LENGTH.search(head)
    if length is None or int(length[1]) > limit or _EXPECTS.search(head):
        return 0
    return int(length[1])


def is_too_large(head: bytes) -> bool:
    """Tell whether a head has more or longer fields than http.server takes."""
    longest = max(map(len, head.split(b"\n"))) if len(head) > LONGEST_LINE else 0
    return head.count(b"\n") > MOST_FIELDS + 2 or longest > LONGEST_LINE


def is_well_formed(head: bytes) -> bool:
    """Tell whether all parties see the same lines in a head, and the same names and values."""
    line = _REQUEST_LINE.match(head)
    return line is not None and not _NOT_IN_A_HEAD.search(head) and bool(_FIELDS.fullmatch(head, line.end()))


class Fields:
    """The fields of a well-formed head (RFC 9112, section 5)."""

    def __init__(self, head: bytes) -> None:
        """Take the lines behind the first one apart."""
        lines = head.decode("latin-1").replace("\r\n", "\n").split("\n")[1:-2]
        self._all = [(name.lower(), value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines)]
        self.last = dict(self._all)
        """Each value by its name, in lower case; the last of those that have one name."""

    def all(self, name: str) -> list[str]:
        """Return the values of `name`."""
        return [value for other, value in self._all if other == name]

    def has_option(self, option: str) -> bool:
        """Tell whether Connection lists `option` (RFC 9110, section 7.6.1)."""
        listed = self.last.get("connection")
        return listed is not None and option in (one.strip().lower() for one in listed.split(","))
