"""Text from elsewhere, made fit to be shown: to a terminal, in a log, on a page."""

from __future__ import annotations


def shown(text: str | bytes, limit: int | None = None) -> str:
    r"""Return `text` with all that is not printable escaped, cut to `limit` characters.

    Control characters, line feeds, marks that turn the direction of text, and bytes that are no
    UTF-8 are written as Python writes them: `\n`, `\x1b`, `\u202e`, `\udcff`.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if limit is None or len(text) <= limit else text[:limit] + "…"
