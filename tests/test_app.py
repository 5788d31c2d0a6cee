"""Who may ask, and which route a question is for: what is there first, and what comes behind the first answers."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from service import PATIENCE

from selfupdate.access import Gate
from selfupdate.app import App
from selfupdate.messages import Request, Response, json_response

if TYPE_CHECKING:
    from collections.abc import Callable


def saying(text: str) -> Callable[[Request], Response]:
    return lambda _: json_response({"said": text})


def question(path: str) -> Request:
    return Request("GET", path, {}, {"host": "localhost"}, b"")


def first_part() -> App:
    return App(Gate(None), {"localhost"}, {"/first": ("GET", saying("first"))})


def test_what_is_there_first_is_answered_before_the_rest_is_there() -> None:
    app = first_part()
    assert app.at_hand == {"/first"}
    assert app.respond(question("/first")).status == 200


def test_other_questions_wait_until_all_is_there() -> None:
    """Whether there is such a route, too, is told only then."""
    app, answers = first_part(), queue.SimpleQueue[tuple[str, int]]()

    def ask(path: str) -> None:
        answers.put((path, app.respond(question(path)).status))

    threads = [
        threading.Thread(target=ask, args=(path,)) for path in ("/late", "/nowhere", "/upgrades/20260101T000000-1")
    ]
    for thread in threads:
        thread.start()
    routes = {"/late": ("GET", saying("late")), "/upgrades/{id}": ("GET", saying("one"))}
    app.complete(routes, ["/late"], lambda *_: None)
    found = dict(answers.get(timeout=PATIENCE) for _ in threads)
    assert found == {"/late": 200, "/nowhere": 404, "/upgrades/20260101T000000-1": 200}
    assert app.at_hand == {"/first", "/late"}


def test_what_was_answered_before_anybody_counted_is_counted_once() -> None:
    app = first_part()
    counted: list[tuple[str, str, int, float]] = []
    app.answered("GET", "/first", 200, 0.25)
    app.answered("", None, 400, 0.5)
    assert not counted
    app.complete({"/late": ("GET", saying("late"))}, (), lambda *answer: counted.append(answer))
    assert len(counted) == 2
    app.answered("POST", "/late", 405, 1.0)
    app.answered("GET", "/nowhere", 404, 2.0)
    assert counted == [
        ("/first", "GET", 200, 0.25),
        ("none", "", 400, 0.5),
        ("/late", "POST", 405, 1.0),
        ("other", "GET", 404, 2.0),
    ]
