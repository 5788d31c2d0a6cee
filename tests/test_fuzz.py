"""Whatever comes from outside is read or refused, in words: no traceback, no hang, no growth.

The properties are tried with a fixed seed here, and by `make fuzz` (`fuzz.py`) with random ones for longer.
"""

from __future__ import annotations

import base64
import gc
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import types
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfupdate import openpgp, state
from selfupdate.client import Client
from selfupdate.connection import Connection
from selfupdate.errors import CandidateError, SelfUpdateError, StartError, StateError, TrustError, UsageError
from selfupdate.errors import VersionError as NoVersionError
from selfupdate.foreign import shown
from selfupdate.journal import Entry, Journal, Record
from selfupdate.messages import Request, Response, json_response
from selfupdate.question import ANSWER_SIZE, NoAnswerError, answer_in
from selfupdate.settings import FLAGS, Limits, check, parse
from selfupdate.sshformat import Key, parse_allowed_signers, parse_public_keys, parse_signatures
from selfupdate.terminal import Terminal
from selfupdate.versions import Specifiers, parse_output
from selfupdate.versions import parse as parse_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_COMMON = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("brief", _COMMON, derandomize=True, max_examples=200)
settings.register_profile("long", _COMMON, derandomize=False, max_examples=500, print_blob=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "brief"))


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """Keep what is logged out of the report: it is many lines for each example."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def _edited(text: bytes, edits: Sequence[tuple[int, int, bytes]]) -> bytes:
    for at, length, new in edits:
        begin = at % (len(text) + 1)
        text = text[:begin] + new + text[begin + length :]
    return text


def mutated(originals: st.SearchStrategy[bytes], *scraps: bytes) -> st.SearchStrategy[bytes]:
    """Texts that differ from valid ones in a few places, or not at all."""
    edit = st.tuples(st.integers(0, 4000), st.integers(0, 20), st.sampled_from(scraps) | st.binary(max_size=6))
    return st.builds(_edited, originals, st.lists(edit, max_size=3))


def assert_is_one_line(error: SelfUpdateError) -> None:
    for text in (str(error), error.remedy or "-"):
        assert text
        assert text.isprintable(), ascii(text)


# Requests.

# Whether a line is right depends on those beside it, too.
LINES = (
    *(b"Host: a", b"host:b", b"Connection: close", b"Connection: keep-alive", b"Expect: 100-continue", b"Origin: null"),
    *(b"Content-Length: 3", b"content-length:36", b"Content-Length: 0", b"Content-Length:  3\t", b"Content-Length: 03"),
    *(
        b"Content-Length: 3, 3",
        b"Content-Length: +3",
        b"Content-Length: 0x3",
        b"Content-Length: 4097",
        b"Content-Length:",
    ),
    *(b"Content-Length : 3", b"Content-Length: 9" + b"9" * 30, b"Content-Length: \xb3", b"Content-Length: 3\x0c"),
    *(b"Transfer-Encoding: chunked", b"transfer-encoding:identity", b"Transfer-Encoding : chunked", b"X: \xe9\x85\xa0"),
    *(b"X: a\0b", b"X: a\rb", b" Content-Length: 3", b"\tX", b"X", b": x", b"From a", b"From: a", b"X(: a", b"\xe9: a"),
    *(b"Content-Type: multipart/form-data; boundary=x", b"Content-Type: multipart/form-data; boundary*=undefined''x"),
)
BODIES = (b"", b"abc", b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", b"0\r\n\r\n")
METHODS = (b"GET", b"POST", b"HEAD", b"DELETE")
TARGETS = (b"/", b"/x?a=1&b", b"//a/../x", b"/%00;=&&=?", b"/?" + b"&" * 300)
ODD_TARGETS = (b"http://a/x", b"*", b"a:80", b"/\xff", b"/\x1b", b"/a b", b"", b"/" + b"x" * 2100)
VERSIONS = (b"HTTP/1.0", b"HTTP/1.9", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/01.1", b"http/1.1", b"")
FRAMING = (
    b"Content-Length: 3",
    b"Content-Length: 36",
    b"Transfer-Encoding: chunked",
    b"Host: b",
    b"Expect: 100-continue",
)
ENDS = ((b"\n",), (b"\r\n", b"\n"), (b"\r\n", b"\r"), (b"\r\r\n", b"\r\n"), (b"\n\r", b"\n"))


def _request(start: Sequence[bytes], lines: Sequence[bytes], ends: Sequence[bytes], body: bytes) -> bytes:
    head = [b" ".join(start), *lines, b""]
    return b"".join(line + ends[number % len(ends)] for number, line in enumerate(head)) + body


def _valid_request(method: bytes, target: bytes, body: bytes) -> bytes:
    if method in {b"GET", b"HEAD"}:
        return b"%s %s HTTP/1.1\r\nHost: a\r\n\r\n" % (method, target)
    return b"%s %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (method, target, len(body), body)


valid_requests = st.builds(
    _valid_request, st.sampled_from(METHODS), st.sampled_from(TARGETS), st.sampled_from(BODIES) | st.binary(max_size=99)
)
starts = st.tuples(st.sampled_from(METHODS), st.sampled_from(TARGETS), st.just(b"HTTP/1.1"))
odd_starts = (
    st.tuples(st.sampled_from((b"get", b"P\0", b"")), st.just(b"/"), st.just(b"HTTP/1.1"))
    | st.tuples(st.sampled_from(METHODS), st.sampled_from(ODD_TARGETS), st.just(b"HTTP/1.1"))
    | st.tuples(st.sampled_from(METHODS), st.just(b"/"), st.sampled_from(VERSIONS))
)
hosts = st.just([b"Host: a"])
lines = st.lists(st.sampled_from(LINES), max_size=3)
lines_of_framing = st.lists(st.sampled_from(FRAMING), min_size=1, max_size=3)
CRLF = st.just((b"\r\n",))
bodies = st.sampled_from(BODIES)
# Odd in one respect each, so that it is this which is refused.
odd_requests = (
    st.builds(_request, odd_starts, hosts, CRLF, bodies)
    | st.builds(_request, starts, lines, CRLF, bodies)
    | st.builds(_request, starts, st.builds(list.__add__, hosts, lines), CRLF, bodies)
    | st.builds(_request, starts, st.builds(list.__add__, hosts, lines_of_framing), CRLF, bodies)
    | st.builds(_request, starts, hosts, st.sampled_from(ENDS), bodies)
)
some_requests = st.tuples(
    st.just(b"") | valid_requests,
    odd_requests
    | mutated(odd_requests | st.binary(max_size=200), b"\r\n", b"\n", b"\r\n\r\n", b" ", b":", b"\0", *LINES),
    st.just(b"") | valid_requests,
).map(b"".join)
cuts = st.lists(st.integers(1, 300), max_size=6)


class Site:
    """A server of one connection, with an application that writes down what it is asked."""

    limits = Limits(body_time=0.001, send_time=5.0)

    def __init__(self, *, ends_connections: bool) -> None:
        self.ends_connections = ends_connections
        self.asked: list[Request] = []

    def respond(self, request: Request) -> Response:
        self.asked.append(request)
        return json_response({"path": request.path, "headers": dict(request.headers)})

    def is_at_hand(self, _path: str) -> bool:
        return True

    def answers(self, method: str, path: str | None, status: int, seconds: float) -> None:
        pass

    def date(self) -> str:
        return "Thu, 01 Jan 1970 00:00:00 GMT"


def pieces_of(raw: bytes, cuts: Sequence[int]) -> deque[bytes]:
    pieces: deque[bytes] = deque()
    for length in cuts:
        pieces.append(raw[:length])
        raw = raw[length:]
    pieces.append(raw)
    return deque(piece for piece in pieces if piece)


def converse(site: Site, pieces: deque[bytes], *, leaves: bool) -> bytes:
    """Send the pieces as a client does that is ahead of the server, which does as its loop does; return the answers."""
    answers = bytearray()
    client, accepted = socket.socketpair()
    connection = Connection(accepted, site)
    with client, accepted:
        client.setblocking(False)
        lives = True
        while lives and pieces:
            client.sendall(pieces.popleft())
            accepted.setblocking(False)
            if connection.collect():
                if pieces:
                    client.sendall(pieces.popleft())
                if not connection.serve_at_once():
                    connection.serve()
                lives = not connection.close_connection
                answers += received(client)
        if lives and leaves:
            client.shutdown(socket.SHUT_WR)
            accepted.setblocking(False)
            while lives and connection.collect():
                connection.serve()
                lives = not connection.close_connection
        elif lives and connection.has_begun:  # its time is over
            connection.serve()
        answers += received(client)
    return bytes(answers)


def received(client: socket.socket) -> bytes:
    found = bytearray()
    try:
        while chunk := client.recv(1 << 16):
            found += chunk
    except BlockingIOError:
        pass
    return bytes(found)


_HEAD = re.compile(
    rb"(?P<method>[A-Z]+) (?P<target>/[!-~]*) HTTP/1\.(?P<minor>[0-9])\r?\n"
    rb"(?P<fields>(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r?\n)*)\r?\n"
)


def certain_requests(raw: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Yield the requests that everybody reads in one way (RFC 9112), up to the first that is none of them."""
    while head := _HEAD.match(raw := re.sub(rb"\A(?:\r\n)+", b"", raw)):
        fields: dict[bytes, list[bytes]] = {}
        for line in head["fields"].splitlines():
            name, _, value = line.partition(b":")
            fields.setdefault(name.lower(), []).append(value.strip(b" \t"))
        lengths, hosts = fields.get(b"content-length", [b"0"]), len(fields.get(b"host", []))
        if hosts > 1 or (not hosts and head["minor"] != b"0") or b"transfer-encoding" in fields:
            return
        if len(lengths) != 1 or not re.fullmatch(rb"[0-9]+", lengths[0]):
            return
        end = head.end() + int(lengths[0])
        if end > len(raw) or (end > head.end() and head["method"] in {b"GET", b"HEAD"}):
            return
        path = "/" + head["target"].decode().partition("?")[0].lstrip("/")
        yield head["method"].decode(), path, raw[head.end() : end]
        if b"close" in fields.get(b"connection", []):
            return
        raw = raw[end:]


_ANSWER = re.compile(rb"HTTP/1\.1 (?P<status>[1-5][0-9]{2}) [A-Za-z -]+\r\n(?P<fields>(?:[A-Za-z-]+: [ -~]*\r\n)*)\r\n")


def read_answers(raw: bytes, methods: Sequence[str]) -> list[int]:
    """Return the statuses of the answers: one for each of `methods`, and perhaps a refusal, which is the last one."""
    statuses: list[int] = []
    while raw:
        answer = _ANSWER.match(raw)
        assert answer, raw
        raw = raw[answer.end() :]
        if answer["status"] == b"100":
            assert not answer["fields"]
            continue
        lengths = re.findall(rb"(?m)^Content-Length: ([0-9]+)\r$", answer["fields"])
        assert len(lengths) == 1
        is_asked = len(statuses) < len(methods)
        body = raw[: int(lengths[0])]
        if is_asked and methods[len(statuses)] == "HEAD":
            body = b""
        elif body or is_asked:  # the refusal of a HEAD has none
            assert len(body) == int(lengths[0])
            json.loads(body)
        statuses.append(int(answer["status"]))
        assert (statuses[-1] == 200) is is_asked
        assert is_asked or b"Connection: close\r\n" in answer["fields"]
        raw = raw[len(body) :]
    assert len(methods) <= len(statuses) <= len(methods) + 1
    return statuses


def check_conversation(raw: bytes, cuts: Sequence[int], *, ends_connections: bool, leaves: bool) -> list[int]:
    """Send `raw`; see that only what is certain is passed on, and all is answered well; return the statuses."""
    site = Site(ends_connections=ends_connections)
    answers = converse(site, pieces_of(raw, cuts), leaves=leaves)
    asked = [(request.method, request.path, request.body) for request in site.asked]
    assert asked == list(certain_requests(raw))[: len(asked)]
    return read_answers(answers, [method for method, _, _ in asked])


@settings(max_examples=5 * settings().max_examples)
@given(some_requests, cuts, st.sampled_from((*[False] * 9, True)), st.booleans())
def test_requests(raw: bytes, cuts: list[int], ends_connections: bool, leaves: bool) -> None:  # noqa: FBT001 - data
    """Whatever a client sends, in whichever pieces: what is not certain is refused, and each answer is well formed."""
    statuses = check_conversation(raw, cuts, ends_connections=ends_connections, leaves=leaves)
    assert len(statuses) <= 1 or not ends_connections


@given(st.lists(valid_requests, max_size=5), cuts)
def test_valid_requests(requests: list[bytes], cuts: list[int]) -> None:
    """Each of many requests on a connection is answered, however they are cut."""
    raw = b"".join(requests)
    statuses = check_conversation(raw, cuts, ends_connections=False, leaves=True)
    assert statuses == [200] * len(requests)


def test_connections_leave_nothing_behind() -> None:
    """Some thousand conversations, good and bad, each with names of its own, take no memory that stays."""

    def converse_often(count: int) -> None:
        for number in range(count):
            line = LINES[number // 2 % len(LINES)] if number % 2 else b"Content-Length: 3"
            raw = b"POST /%d HTTP/1.1\r\nHost: a\r\nX-%d: x\r\n%s\r\n\r\nabc" % (number, number, line)
            check_conversation(raw, [number % 90 + 1], ends_connections=False, leaves=number % 3 == 0)

    converse_often(100)
    tracemalloc.start()
    try:
        converse_often(500)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        converse_often(1500)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 64 * 1024
    finally:
        tracemalloc.stop()


# Versions.

version_texts = st.from_regex(
    r"v?[0-9]{1,2}(\.[0-9]{1,2}){0,3}(-[0-9a-z.-]{0,9}|(a|b|rc|\.dev|\.post)[0-9]{1,2})?(\+[0-9a-z.-]{1,5})?",
    fullmatch=True,
)


@given(
    mutated(
        version_texts.map(str.encode), b"\n", b"\r\n", b"self-update ", b"\x1b[2J", b"9" * 40, b"1!", b"\xe2\x80\xae"
    )
)
def test_version_output(output: bytes) -> None:
    """What a program prints is a version, which reads as itself, or is refused in a line."""
    try:
        version = parse_output(output)
    except NoVersionError as error:
        assert_is_one_line(error)
        return
    assert str(version).isprintable()
    again = parse_version(str(version))
    assert (again, str(again)) == (version, str(version))


@given(st.lists(version_texts, min_size=3, max_size=3))
def test_version_order(texts: list[str]) -> None:
    """Of two versions one is the greater, or they are equal, and so for three."""
    try:
        one, two, three = map(parse_version, texts)
    except NoVersionError:
        return
    assert [one < two, one == two, one > two].count(True) == 1
    assert (one == two) is (two == one)
    assert (one < two) is (two > one) is (not one >= two)
    assert one != two or hash(one) == hash(two)
    assert sorted([one, two, three]) == sorted([three, one, two]) == sorted([two, three, one])
    assert not one <= two <= three or one <= three


# Signatures. The keys were made for this, and thrown away.

SIGNATURE = b"""\
-----BEGIN SSH SIGNATURE-----
U1NIU0lHAAAAAQAAADMAAAALc3NoLWVkMjU1MTkAAAAgg2VETpeLmQDp0W/UjMW61ym+bL
/eyPAbwhV/JGFYA9oAAAATcmVsZWFzZUBzZWxmLXVwZGF0ZQAAAAAAAAAGc2hhNTEyAAAA
UwAAAAtzc2gtZWQyNTUxOQAAAEAtfFFZUN83PCIlxQtaYYQU/fq8nplUV+AYPVeAoPhZiz
+oiivqyPqUB88Fj+znmgcy2/CExz99wRNkfZJ53fsJ
-----END SSH SIGNATURE-----
"""
ED25519 = b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIINlRE6Xi5kA6dFv1IzFutcpvmy/3sjwG8IVfyRhWAPa"
ECDSA = (
    b"ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBAJRQvzglqrOGFiG8QK8A2t8Wk5Zsc8gXkXQN"
    b"xNq1Fghzl69sbkuPDKCnz105cO2RF9fiFwDQbuWVFDj2+UoqsA="
)


def strings(parts: Sequence[bytes]) -> bytes:
    """Return the parts as SSH puts them together (RFC 4251, section 5)."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def _armored(blob: bytes) -> bytes:
    return b"-----BEGIN SSH SIGNATURE-----\n%b\n-----END SSH SIGNATURE-----\n" % base64.b64encode(blob)


armored = (
    st.lists(st.binary(max_size=40), max_size=6)
    .map(strings)
    .flatmap(lambda fields: mutated(st.just(b"SSHSIG\0\0\0\1" + fields), b"\xff\xff\xff\xff", b"\0\0\0\0"))
    .map(_armored)
)
signature_files = st.lists(
    st.just(SIGNATURE) | armored | mutated(st.just(SIGNATURE), b"\n", b"\r\n", b"=", b"-----", b"\0"), max_size=3
).map(b"".join)


@given(
    signature_files
    | mutated(st.just(SIGNATURE * 9), b"\n")
    | st.sampled_from((b"-----BEGIN PGP SIGNATURE-----\n", b"untrusted comment: x", b"-" * 9999)),
    st.text(max_size=8),
)
def test_signature_files(content: bytes, name: str) -> None:
    """A signature file holds signatures, each of which can be read alone, or is refused in a line."""
    try:
        signatures = parse_signatures(content, name)
    except CandidateError as error:
        assert_is_one_line(error)
        return
    assert len(signatures) <= 8
    for signature in signatures:
        assert parse_signatures(signature.armored, "again") == [signature]


# Whom to trust.

TIMES = (b"20200101Z", b"202001010000Z", b"20200101000000Z", b"19691231Z", b"19700101Z", b"00010101Z", b"99991231Z")
ODD_TIMES = (b"20200101", b"20200230Z", b"20200101000060Z", b"99999999999999Z", b"-0200101Z", b"")
names = st.sampled_from((b"ann", b"bob@example.org", b"a" * 64, b"x.y_z-1+2"))
options = st.lists(
    st.sampled_from((b'namespaces="a"', b'namespaces="release@self-update,b"'))
    | st.builds(
        b'%s="%s"'.__mod__,
        st.tuples(st.sampled_from((b"valid-after", b"valid-before")), st.sampled_from((*TIMES, *TIMES, *ODD_TIMES))),
    )
    | st.sampled_from((b"cert-authority", b'namespaces=""', b'namespaces="*"')),
    min_size=1,
    max_size=3,
).map(b",".join)
blobs = st.builds(
    lambda kind, fields: kind + b" " + base64.b64encode(strings([kind, *fields])),
    st.sampled_from((b"ssh-ed25519", b"ssh-rsa", b"ssh-dss", b"sk-ssh-ed25519@openssh.com", b"ecdsa-sha2-nistp256")),
    st.lists(st.binary(min_size=31, max_size=33) | st.sampled_from((b"", b"nistp256", b"\x7f" * 400)), max_size=3),
)
lines_of_signers = st.builds(
    b"%s%s%s".__mod__,
    st.tuples(
        st.builds(b" ".join, st.tuples(names, options, st.sampled_from((ED25519, ED25519, ECDSA)) | blobs)),
        st.sampled_from((b"", b" somebody's key", b"=", b"\t", b"\xff")),
        st.sampled_from((b"\n", b"\r\n", b"\n\n# a comment\n", b"\r\n\r\n", b"")),
    ),
)
# A line that is right, so that more than the first refusal is seen.
right_lines = st.builds(
    b'%s namespaces="a",valid-before="%s" ssh-ed25519 %s\n'.__mod__,
    st.tuples(
        names,
        st.sampled_from(TIMES),
        st.binary(min_size=32, max_size=32).map(lambda key: base64.b64encode(strings([b"ssh-ed25519", key]))),
    ),
)
SCRAPS = (b"\n", b" ", b"\t", b'"', b",", b"=", b"#", b"\0", b"\r", b"*", b"!ann", b"\xc3\xa9")
signers_files = st.lists(
    right_lines | lines_of_signers | mutated(right_lines, *SCRAPS) | mutated(lines_of_signers, *SCRAPS), max_size=3
).map(b"".join)


def line_of(key: Key) -> bytes:
    """Return the key as a line of an allowed-signers file."""
    return b'%s namespaces="%s" %s' % (key.name.encode(), ",".join(key.namespaces).encode(), key.line)


@given(signers_files)
def test_allowed_signers(content: bytes) -> None:
    """A list of signers holds keys, which read as themselves when they are written down, or is refused in a line."""
    try:
        keys = parse_allowed_signers(content)
    except TrustError as error:
        assert_is_one_line(error)
        return
    again = parse_allowed_signers(b"".join(map(line_of, keys)))
    assert [(key.name, key.kind, key.key, key.namespaces) for key in again] == [
        (key.name, key.kind, key.key, key.namespaces) for key in keys
    ]
    assert len({key.key for key in keys}) == len(keys)


@given(signers_files | mutated(st.sampled_from((ED25519, ECDSA + b"\n" + ED25519)), *SCRAPS) | st.binary(max_size=60))
def test_revoked_keys(content: bytes) -> None:
    """A list of public keys holds keys, or is refused with a reason in a line."""
    try:
        assert all(parse_public_keys(content))
    except ValueError as error:
        assert_is_one_line(TrustError(str(error), "", "-"))


def test_ssh_keygen_reads_the_allowed_signers_that_are_accepted(tool: Callable[[str], str], tmp_path: Path) -> None:
    """It passes over what it cannot read in silence, so nothing is accepted here that it cannot read."""
    program, path = tool("ssh-keygen"), tmp_path / "allowed"

    @given(signers_files)
    def hold(content: bytes) -> None:
        try:
            keys = parse_allowed_signers(content)
        except TrustError:
            return
        path.write_bytes(content)
        for name in {key.name for key in keys}:
            answer = subprocess.run(
                [program, "-Y", "match-principals", "-I", name, "-f", str(path)], capture_output=True, check=False
            )
            assert answer.stdout.decode().split() == [key.name for key in keys if key.name == name], answer.stderr

    hold()


PINNED = ("A" * 40, "B" * 64)
KEYWORDS = ("NEWSIG", "GOODSIG", "VALIDSIG", "KEY_CONSIDERED", "TRUST_UNDEFINED", "NO_PUBKEY", "ERRSIG", "BADSIG")
validsig = st.builds(
    "[GNUPG:] VALIDSIG {} 2020-01-01 {} 0 4 0 22 {} {} {}".format,
    st.sampled_from(PINNED),
    st.sampled_from(("1577836800", "99999999999", "-1")),
    st.sampled_from(("8", "10", "2")),
    st.sampled_from(("00", "01")),
    st.sampled_from((*PINNED, "C" * 40, "")),
)
good = st.builds(
    "[GNUPG:] NEWSIG\n[GNUPG:] GOODSIG 0 x\n[GNUPG:] VALIDSIG {} 2020-01-01 1577836800 0 4 0 22 8 00 {}".format,
    st.sampled_from(PINNED),
    st.sampled_from((*PINNED, *PINNED, "C" * 40)),
)
status_lines = st.builds("[GNUPG:] {} {}".format, st.sampled_from(KEYWORDS), st.text(max_size=9))


@given(mutated(st.lists(good | good | validsig | status_lines, max_size=4).map("\n".join).map(str.encode), b"\n", b" "))
def test_openpgp_status(status: bytes) -> None:
    """A good signature is that of a pinned key, and no line speaks against one; all else is refused in a line."""
    try:
        signers = openpgp.judge(status, PINNED, 1600000000.0)
    except CandidateError as error:
        assert_is_one_line(error)
        return
    assert signers
    assert {signer.key for signer in signers} <= set(PINNED)
    assert status.count(b" VALIDSIG ") >= len(signers)
    assert not re.search(rb"(?m)^\[GNUPG:\] (NO_PUBKEY|ERRSIG|BADSIG) ", status)


# The state directory.

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
NESTED = b"[" * 20_000
THEN = "2026-07-14T09:30:00.000Z"
whole_records = st.builds(
    Record,
    id=st.sampled_from(("1", "2", "3")),
    from_version=st.sampled_from(("1.0.0", "2.0.0-rc.1")),
    phase=st.just("RUNNING"),
    started_at=st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
    ended_at=st.none() | st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
    to_version=st.sampled_from((None, "1.0.0", "2.0.0-rc.1")),
    outcome=st.sampled_from((None, "committed", "aborted")),
    timeline=st.just((Entry("CHOOSING", THEN),)),
    signer_keys=st.just(("SHA256:x",)),
)


def line_of_record(record: Record, **changes: Any) -> bytes:
    return json.dumps({**record.as_json(), **changes}).encode()


FOREIGN = Record("foreign", "1.0.0", "RUNNING", THEN, timeline=(Entry("CHOOSING", THEN),))
broken_lines = (
    st.builds(
        lambda name, value: line_of_record(FOREIGN, **{name: value}),
        st.sampled_from(sorted(FOREIGN.as_json())),
        json_values,
    )
    | mutated(st.just(line_of_record(FOREIGN)), b"null", b"[]", b"{}", b'"', b"\r", b"9" * 5000, b"\\ud800", b"1e999")
    | st.sampled_from((NESTED, b'{"id":' + NESTED, b"\xff", b"{}", b"[]", b"1", b'""', b"\0" * 9))
    | st.binary(max_size=50)
)


def fits(value: object, hint: Any) -> bool:
    return isinstance(value, hint if isinstance(hint, types.UnionType) else get_origin(hint) or hint)


@given(st.lists(whole_records | broken_lines, max_size=6), broken_lines | st.just(b""))
def test_journals(entries: list[Record | bytes], tail: bytes) -> None:
    """A journal is read as far as its lines are whole; what is written behind the others is read again."""
    lines = [line_of_record(entry) if isinstance(entry, Record) else entry for entry in entries]
    whole = {entry.id: entry for entry in entries if isinstance(entry, Record)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal"
        path.write_bytes(b"".join(line + b"\n" for line in lines) + tail)
        journal = Journal(path)
        opens(journal)
        assert {key: journal.get(key) for key in whole} == whole
        records = journal.records()
        for record in records:
            assert all(fits(getattr(record, name), hint) for name, hint in get_type_hints(Record).items()), record
        with path.open("ab") as file:
            file.write(line_of_record(Record("4", "1.0.0", "RUNNING", THEN)) + b"\n")
        again = Journal(path)
        again.read()
        assert [record.id for record in again.records()] == ["4", *(record.id for record in records)]


def opens(journal: Journal) -> None:
    """Open a journal, and give its descriptor back; it is for the life of a process, and has no end of its own."""
    try:
        journal.open()
    except StateError as error:
        assert_is_one_line(error)
    finally:
        if journal._fd >= 0:  # noqa: SLF001 - as above
            os.close(journal._fd)  # noqa: SLF001 - as above


LOCK = b'{"pid": 1, "bind": "localhost:8080"}'
lock_files = (
    mutated(st.just(LOCK), b"null", b"[]", b"{}", b'"', b"9" * 5000, b"\\ud800", b"\\n")
    | st.builds(lambda pid, bind: json.dumps({"pid": pid, "bind": bind}).encode(), json_values, json_values)
    | st.sampled_from((NESTED, b"", b"\0", b"[]", b"null"))
)


@given(lock_files)
def test_lock_files(content: bytes) -> None:
    """A lock says which process serves where, or nothing; who asks for the service is told what is wrong there."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "lock").write_bytes(content)
        signed = state.signature(Path(directory))
        assert set(signed) in (set(), {"pid", "bind"})
        assert all(text.isprintable() for text in signed.values())
        try:
            Client(parse(["-state-dir", directory], {}), Terminal.of(sys.stdout, {}))
        except StartError as error:
            assert_is_one_line(error)


# The command line.

VALUES = (
    *(
        "",
        "true",
        "false",
        "0",
        "1",
        "x",
        "1s",
        "1m30s",
        "0.5h",
        "9h9h9h",
        ":0",
        ":99999",
        "localhost:8080",
        "[::1]:1",
        "[::1",
    ),
    *(
        "unix:/x",
        "unix:@x",
        "unix:/x,:0,fd:web",
        "fd:web,fd:web",
        "unix:/\n",
        "unix:/\ud800",
        "unix:/" + "x" * 200,
        "a:b:1",
        "é:1",
        "\uff11:\uff11",
        "\0",
        ">=1.2,<2",
        ">=1!0,~=2",
    ),
    *(
        "==" + "9" * 5000,
        ">=1.0.dev" + "9" * 5000,
        "===x",
        ">=1.*",
        "*",
        "A" * 40,
        "A" * 64 + " , " + "B" * 40,
        "a.b,c",
    ),
    *("release@self-update", "\u2028", "\x1b[2J"),
)
flag_values = st.sampled_from(VALUES) | st.text(max_size=5)
flags = st.sampled_from([flag.name for flag in FLAGS])
arguments = st.lists(
    st.builds(lambda dash, name: dash + name, st.sampled_from(("-", "--")), flags)
    | st.builds("-{}={}".format, flags, flag_values)
    | flag_values,
    max_size=5,
)
allows = st.sampled_from(VALUES).map(lambda text: [f"-allow={text}"])
pairs = flag_values.map(lambda text: [f"-bind={text}", f"-upgrade-bind={text}"])
environments = st.dictionaries(
    st.sampled_from([*(flag.variable for flag in FLAGS), "HOME", "STATE_DIRECTORY", "XDG_STATE_HOME"]),
    flag_values,
    max_size=3,
)


@given(arguments | allows | pairs, environments)
def test_settings(arguments: list[str], environ: dict[str, str]) -> None:
    """A command line and an environment are taken, so that a successor takes them too, or refused in a line."""
    try:
        chosen = parse(arguments, environ)
        check(chosen)
    except UsageError as error:
        assert_is_one_line(error)
        return
    inherited = parse([], {**chosen.environment(), "HOME": "/"}).inheriting(chosen.trust)
    assert inherited.given == {
        name: text for name, text in chosen.given.items() if name not in {"bind", "upgrade", "upgrade-bind"}
    }
    if chosen.allow is not None:
        again = Specifiers(str(chosen.allow))
        for version in map(parse_version, ("1.2.3", "1.2.3-rc.1", "1.2.3-x.y")):
            assert (version in chosen.allow) == (version in again)


@given(st.text() | st.binary() | st.sampled_from(VALUES), st.none() | st.integers(0, 9))
def test_foreign_text(text: str | bytes, limit: int | None) -> None:
    """Text from elsewhere is shown on one line, in letters that every output takes, and is then as it is shown."""
    once = shown(text, limit)
    assert not once or once.isprintable()
    assert once.encode().decode() == once
    assert shown(once, limit) == once
    assert limit is None or len(once) <= limit + 1


ANSWERS = (
    b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"status": "ok"}',
    b'HTTP/1.0 503 Service Unavailable\r\nServer: x\r\n\r\n{"detail": "no"}',
    b"HTTP/1.1 404\n\n",
    b"HTTP/1.1 100\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
)


@given(
    mutated(st.sampled_from(ANSWERS), b"\r\n", b"\n\n", b"Content-Length: 99999999\r\n", b"x" * 70000),
    st.integers(0, 200),
)
def test_answers_of_a_successor(received: bytes, cut: int) -> None:
    """An answer is read or refused; what has come of it so far is incomplete, or the same answer."""
    try:
        whole = answer_in(bytearray(received), has_ended=True)
    except NoAnswerError:
        return
    assert whole is not None
    status, body = whole
    assert 100 <= status <= 599
    assert len(body) <= ANSWER_SIZE
    early = answer_in(bytearray(received[:cut]), has_ended=False)
    assert early in {None, whole}
