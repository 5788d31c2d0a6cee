"""Questions to a successor: what is taken for an answer, and when it is complete."""

from __future__ import annotations

import pytest

from selfupdate.question import ANSWER_SIZE, NoAnswerError, answer_in, ask_for

OK = b"HTTP/1.1 200 OK\r\n"


def test_a_question_says_what_is_asked_for() -> None:
    assert ask_for("/replace", {"Authorization": "Bearer x"}) == (
        b"GET /replace HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer x\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("received", "answer"),
    [
        (OK + b"Content-Length: 2\r\n\r\n{}", (200, b"{}")),
        (OK + b"content-length:\t2 \r\n\r\n{} and more", (200, b"{}")),
        (b"HTTP/1.0 503 \r\nContent-Length: 0\r\n\r\n", (503, b"")),
        (b"HTTP/1.0 404 Not Found\nContent-Length: 1\n\nx", (404, b"x")),  # RFC 9112, section 2.2
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\n{}",
            (200, b"{}"),
        ),
        (
            OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{'a':\r\nA;x=y\r\n'bcdefgh'}\r\n0\r\n",
            (200, b"{'a':'bcdefgh'}"),
        ),
    ],
)
def test_an_answer_that_says_its_end_is_complete_with_it(received: bytes, answer: tuple[int, bytes]) -> None:
    """Each beginning of it but the whole is incomplete."""
    assert answer_in(bytearray(received), has_ended=False) == answer
    whole = len(received) - len(b" and more") if received.endswith(b" and more") else len(received)
    for size in range(whole):
        assert answer_in(bytearray(received[:size]), has_ended=False) is None


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    received = bytearray(b"HTTP/1.1 200\r\nX: Content-Length: 1\r\n\r\n{}")
    assert answer_in(received, has_ended=False) is None
    assert answer_in(received, has_ended=True) == (200, b"{}")


def test_no_more_is_waited_for_than_can_be_of_use() -> None:
    """Whoever talks without end is heard out to a bound."""
    much = b"x" * ANSWER_SIZE
    for length in (b"", b"Content-Length: 999999999\r\n"):
        found = answer_in(bytearray(OK + length + b"\r\n" + much), has_ended=False)
        assert found == (200, much)
    chunks = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    for framed in (b"FFFFFFFF\r\n" + much, b"8000\r\n" + much[: 1 << 15] + b"\r\nFFFFF\r\n" + much):
        assert answer_in(bytearray(chunks + framed), has_ended=False) == (200, much)
    for endless in (OK + b"X: " + much, b"HTTP/1.1 100 Continue\r\n\r\n" * 3000):
        with pytest.raises(NoAnswerError, match="no HTTP"):
            answer_in(bytearray(endless), has_ended=False)
    with pytest.raises(NoAnswerError, match="cut"):
        answer_in(bytearray(chunks + b"1;" + much + much), has_ended=False)


@pytest.mark.parametrize(
    ("received", "why"),
    [
        (b"", "closed the connection"),
        (b"ready\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: y\r\n", "no HTTP"),
        (b"HTTP/2 200\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 0200 OK\r\n\r\n", "no HTTP"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP"),
        (OK + b"Content-Length: 3\r\n\r\n{}", "cut"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "cut"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n{}\r\n", "cut"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "no HTTP"),
    ],
)
def test_what_is_no_answer_is_said(received: bytes, why: str) -> None:
    with pytest.raises(NoAnswerError, match=why):
        answer_in(bytearray(received), has_ended=True)
