"""The page for a browser that runs no script: the state as it is now, in the page that explains how to act.

A script draws everything else, from what the routes say. Here all that comes from
elsewhere is escaped, and stands in an element that keeps its direction to itself.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from selfupdate.journal import Record

MARK = b"<!-- the state as it is now -->"
"""Where the state goes in the page."""

SHOWN = 20
"""Upgrades that are listed; the newest."""


def with_state(
    page: bytes, status: Mapping[str, Any], records: Sequence[Record], host: str, *, needs_token: bool
) -> bytes:
    """Return `page` with the state for those who run no script.

    `status` is the answer to `GET /status`, `records` are all upgrades, newest first, and `host` is what the
    browser calls the service.
    """
    parts = [
        "<div class=plain>",
        f"<h1><span class=overline>Running</span> {_text(status['version'])}</h1>",
        *_notices(status),
        _table(
            [
                ("Phase", status["phase"]),
                ("Since", status["started_at"]),
                ("Process", status["pid"]),
                ("Generation", status["generation"]),
                ("Address", status["bind"]),
                ("Signed by", (status["trust"]["running"] or {}).get("name", "not known")),
                ("After a restart", status["installed"]["version"]),
            ]
        ),
        _how_to_act(host, needs_token=needs_token),
        _history(records[:SHOWN]),
        "</div>",
    ]
    return page.replace(MARK, "\n".join(parts).encode())


def _text(value: object) -> str:
    return f"<bdi>{html.escape(str(value))}</bdi>"


def _table(rows: Sequence[tuple[str, object]]) -> str:
    lines = (f"<tr><th scope=row>{name}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(lines)}</table>"


def _notices(status: Mapping[str, Any]) -> list[str]:
    """Return what is unsafe, or not as it should be."""
    trust, installed = status["trust"], status["installed"]
    notices = []
    if not trust["checked"]:
        notices.append("Signatures are not checked: whoever can write to the upgrade directory decides what runs.")
    if trust["reason"]:
        notices.append(f"{trust['reason']} To mend it: {trust['remedy']}.")
    if trust["running"] and trust["running"]["reason"]:
        notices.append(f"What runs was signed by {trust['running']['name']}: {trust['running']['reason']}.")
    if installed["version"] != status["version"]:
        why = f": {installed['reason']}" if installed["reason"] else ""
        notices.append(f"A restart will bring {installed['version']} back{why}.")
    return [f"<p class=failure>{_text(notice)}</p>" for notice in notices]


def _how_to_act(host: str, *, needs_token: bool) -> str:
    """Return the commands that do what the page's buttons do."""
    token = '-H "Authorization: Bearer $(cat token)" ' if needs_token else ""
    commands = (
        f"curl 'http://{host}/candidates'",
        f"curl -X POST {token}'http://{host}/upgrade?wait=30s'",
        f"curl -X POST {token}'http://{host}/rollback?wait=30s'",
    )
    shown = html.escape("\n".join(commands))
    return (
        "<h2>How to act</h2>"
        "<p>This page has its buttons from JavaScript, which is off. These commands list what could run, upgrade to "
        "the greatest of it, and go back:</p>"
        f"<pre>{shown}</pre>"
        "<p>On the machine itself, with the service's own flags, <code>self-update -status</code>, <code>-apply</code> "
        "and <code>-rollback</code> do the same. Load the page again to see what has become of it.</p>"
    )


def _history(records: Sequence[Record]) -> str:
    if not records:
        return "<h2>What happened before</h2><p>No upgrade so far.</p>"
    names = ("Began", "What", "Outcome", "Why")
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    lines = []
    for record in records:
        what = f"{record.kind} {record.from_version} → {record.to_version or '?'}"
        why = ". To mend it: ".join(filter(None, (record.reason, record.remedy)))
        cells = (record.started_at, what, record.outcome or record.phase, why)
        lines.append(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    rows = "".join(lines)
    return f"<h2>What happened before</h2><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
