"""The signature file beside a candidate, and who made the signatures in it, in whichever scheme."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from selfupdate.errors import CandidateError
from selfupdate.foreign import shown

MAX_SIZE = 16 * 1024
"""Bytes of a signature file."""

_KINDS = (
    (b"-----BEGIN SSH SIGNATURE-----", "an SSH signature"),
    (b"-----BEGIN PGP ", "an OpenPGP signature"),
    (b"\x88", "an OpenPGP signature"),  # a packet of tag 2, not armored (RFC 9580, section 4.2)
    (b"\x89", "an OpenPGP signature"),
    (b"\xc2", "an OpenPGP signature"),
    (b"untrusted comment:", "a minisign or signify signature"),
)


def is_namespace(text: str) -> bool:
    """Tell whether `text` can name what SSH signatures are for."""
    return re.fullmatch("[a-z0-9][a-z0-9.@_-]{0,127}", text) is not None


class Signer(NamedTuple):
    """Whose signature was found good."""

    name: str
    key: str
    """The fingerprint of the key."""


def read(path: Path, remedy: str) -> bytes:
    """Return the content of a signature file. Raises CandidateError; `remedy` says how to make one."""
    name = shown(path.name)
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise CandidateError(f"no signature: {name} is not there", "signature-missing", remedy) from None
    except OSError as error:
        if path.is_symlink():
            raise _not_regular(name) from None
        raise CandidateError(f"{name} cannot be read: {error.strerror}", "signature-unreadable") from error
    before = os.fstat(fd)
    if not stat.S_ISREG(before.st_mode):
        os.close(fd)
        raise _not_regular(name)
    with open(fd, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor, not a path
        if before.st_size > MAX_SIZE:
            raise CandidateError(f"{name} has {before.st_size} bytes; at most {MAX_SIZE} are read", "signature-too-big")
        content = file.read(MAX_SIZE + 1)
        after = os.fstat(fd)
    if (len(content), before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CandidateError(f"{name} is still being written; it is looked at again", "signature-changing")
    if not content:
        raise CandidateError(f"{name} is empty", "signature-empty", remedy)
    return content


def _not_regular(name: str) -> CandidateError:
    return CandidateError(f"{name} is not a regular file", "signature-not-regular", "copy the signature itself there")


def kind_of(content: bytes) -> str | None:
    """Return which kind of signature a file seems to hold, in words, or None."""
    return next((kind for begin, kind in _KINDS if content.startswith(begin)), None)


def malformed(name: str, content: bytes, expected: str, remedy: str) -> CandidateError:
    """Return the error for a file that is not `expected` alone; it names another kind that it seems to be."""
    kind = kind_of(content)
    what = f"holds {kind}, not {expected}" if kind not in {None, expected} else f"is not {expected}, whole and alone"
    return CandidateError(f"{shown(name)} {what}", "signature-malformed", remedy)


def names(signers: Sequence[Signer]) -> str | None:
    """Return who signed, in words, or None where nobody did."""
    return ", ".join(sorted({signer.name for signer in signers})) or None


def enough(signers: Sequence[Signer], required: int) -> bool:
    """Tell whether so many different people signed, each with a key of their own."""
    return min(len({signer.name for signer in signers}), len({signer.key for signer in signers})) >= required


def not_enough(signers: Sequence[Signer], required: int, refusals: Sequence[CandidateError]) -> CandidateError:
    """Return the error for too few good signatures: the first refusal itself where there is nothing better to say."""
    if refusals and not signers:
        return refusals[0]
    count = len({signer.name for signer in signers})
    valid = f"{count} valid ({names(signers)})" if count else "none valid"
    others = "".join(f"; {refusal}" for refusal in refusals)
    return CandidateError(
        f"{required} signers needed, {valid}{others}", "not-enough-signers", "let another one sign it, too"
    )
