"""The formats of OpenSSH that are read here: allowed signers, signatures, and public keys. No effects.

Reading them serves to refuse early, to ask ssh-keygen about the right key, and to
say what is wrong; it never decides that a signature is good. ssh-keygen passes
over faulty lines of an allowed-signers file in silence, so here each must be right.
"""

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from selfupdate.errors import TrustError
from selfupdate.foreign import shown
from selfupdate.signature import is_namespace, malformed

MAX_SIGNATURES = 8
"""In one file; an ed25519 signature has some 300 bytes."""

_ARMOR = re.compile(rb"-----BEGIN SSH SIGNATURE-----\n([A-Za-z0-9+/=\n]+)\n-----END SSH SIGNATURE-----\n?")
_MAGIC = b"SSHSIG"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}"
_LINE = re.compile(
    rf"(?P<name>{_NAME})[ \t]+(?P<options>[^ \t]+)[ \t]+"
    r"(?P<kind>[a-z0-9@.-]+)[ \t]+(?P<key>[A-Za-z0-9+/]+=*)(?:[ \t].*)?"
)
_OPTION = re.compile(r'([a-z-]+)(?:="([^"]*)")?(?:,|$)')
_TIMES = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}

# The fields of each kind of public key, its own name included, and which of them is the key, of how many bytes
# (RFC 4253, RFC 5656, RFC 8709, PROTOCOL.u2f); 0 for those that have no one length.
_FIELDS = {
    "ssh-ed25519": (2, 1, 32),
    "ssh-rsa": (3, 2, 0),
    "ecdsa-sha2-nistp256": (3, 2, 65),
    "ecdsa-sha2-nistp384": (3, 2, 97),
    "ecdsa-sha2-nistp521": (3, 2, 133),
    "sk-ssh-ed25519@openssh.com": (3, 1, 32),
    "sk-ecdsa-sha2-nistp256@openssh.com": (4, 2, 65),
}
_LEAST_RSA_BITS = 3072


def fingerprint(key: bytes) -> str:
    """Return the fingerprint of a public key as ssh-keygen prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


class Key(NamedTuple):
    """A line of the allowed-signers file (ssh-keygen(1), ALLOWED SIGNERS)."""

    name: str
    kind: str
    key: bytes
    namespaces: tuple[str, ...]
    after: float | None
    """Seconds since the epoch before which the key is not valid."""
    before: float | None
    """Those after which it is not."""

    @property
    def line(self) -> bytes:
        """The public key as a file holds it."""
        return f"{self.kind} {base64.b64encode(self.key).decode()}\n".encode()


class Signature(NamedTuple):
    """One signature of a file, as far as it can be read without the file."""

    armored: bytes
    key: bytes
    namespace: str


class _FaultError(Exception):
    """A line that can't be relied on."""


def parse_allowed_signers(content: bytes) -> list[Key]:
    """Return the keys of an allowed-signers file, strictly.

    Raises TrustError with the number of the first line that is not as it must be.
    """
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            text = line.decode("ascii").strip(" \t\r")
            if not text or text.startswith("#"):
                continue
            key = _parse_line(text)
            if key.key in keys:
                raise _FaultError("the same key stands in an earlier line")
        except UnicodeDecodeError:
            why = "it has a byte that is not ASCII"
        except _FaultError as error:
            why = str(error)
        else:
            keys[key.key] = key
            continue
        raise TrustError(
            f"the allowed-signers file has a fault in line {number}: {why}",
            "trust-bad",
            'write NAME namespaces="NAMESPACE" TYPE KEY in each line',
        )
    if not keys:
        raise TrustError("the allowed-signers file lists no key", "trust-empty", "add a line for each signer")
    return list(keys.values())


def _parse_line(text: str) -> Key:
    match = _LINE.fullmatch(text)
    if match is None:
        raise _FaultError(f"{shown(text, 60)} is not one plain name, options, a type and a key")
    options = _parse_options(match["options"])
    namespaces = options.get("namespaces", "").split(",")
    if not all(map(is_namespace, namespaces)):
        raise _FaultError('namespaces="…" must list plain namespaces')
    try:
        key = base64.b64decode(match["key"], validate=True)
    except binascii.Error:
        raise _FaultError("the key is not base64") from None
    if base64.b64encode(key).decode() != match["key"]:
        raise _FaultError("the key is not base64 in its only form")
    _check_key(match["kind"], key)
    after, before = _parse_time("valid-after", options), _parse_time("valid-before", options)
    if after is not None and before is not None and before <= after:
        raise _FaultError("valid-before is not behind valid-after")
    return Key(match["name"], match["kind"], key, tuple(namespaces), after, before)


def _parse_options(text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    end = 0
    while end < len(text):
        match = _OPTION.match(text, end)
        if match is None or match[1] not in {"namespaces", "valid-after", "valid-before"} or match[2] is None:
            raise _FaultError(f"{shown(text[end:], 60)} is no option that is taken here")
        if match[1] in options:
            raise _FaultError(f"{match[1]} is there more than once")
        options[match[1]] = match[2]
        end = match.end()
    if text.endswith(","):
        raise _FaultError("the options end with a comma")
    return options


def _parse_time(name: str, options: dict[str, str]) -> float | None:
    if name not in options:
        return None
    text = options[name]
    form = _TIMES.get(len(text) - 1)
    try:
        if form is None or not re.fullmatch("[0-9]+Z", text):
            raise ValueError
        seconds = datetime.strptime(text[:-1], form).replace(tzinfo=UTC).timestamp()
        if seconds <= 0:  # which ssh-keygen takes for no time at all, or for none that there is
            raise ValueError
    except (ValueError, OverflowError):
        raise _FaultError(f"{name} must be a time in UTC such as 20271231Z") from None
    return seconds


def _check_key(kind: str, key: bytes) -> None:
    if kind not in _FIELDS:
        raise _FaultError(f"keys of the type {shown(kind, 60)} are not taken here")
    try:
        fields = list(_strings(key))
    except ValueError:
        raise _FaultError("the key is cut, or not one of its type") from None
    count, place, length = _FIELDS[kind]
    if fields[0] != kind.encode() or len(fields) != count or len(fields[place]) != (length or len(fields[place])):
        raise _FaultError("the key is not of the type that it says")
    if kind == "ssh-rsa" and int.from_bytes(fields[2], "big").bit_length() < _LEAST_RSA_BITS:
        raise _FaultError(f"an RSA key must have at least {_LEAST_RSA_BITS} bits")


def parse_public_keys(content: bytes) -> set[bytes]:
    """Return the keys of a file with a public key a line. Raises ValueError, naming the line."""
    found = set()
    for number, line in enumerate(content.split(b"\n"), 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        try:
            key = base64.b64decode(words[1], validate=True)
            kind, *fields = _strings(key)
            if kind != words[0] or not fields:
                raise ValueError("not of the type that it says")
        except (ValueError, IndexError):
            raise ValueError(f"line {number} is not a public key") from None
        found.add(key)
    return found


def _strings(data: bytes) -> Iterator[bytes]:
    """Yield the strings that `data` is made of (RFC 4251, section 5). Raises ValueError where it is not."""
    while data:
        if len(data) < 4 or len(data) - 4 < (length := struct.unpack_from(">I", data)[0]):  # noqa: PLR2004 - a uint32
            raise ValueError("cut")
        yield data[4 : 4 + length]
        data = data[4 + length :]


def parse_signatures(content: bytes, name: str) -> list[Signature]:
    """Return the signatures in the file `name`. Raises CandidateError where there is anything else."""
    content = content.replace(b"\r\n", b"\n")
    signatures: list[Signature] = []
    end = 0
    while end < len(content):
        match = _ARMOR.match(content, end)
        signature = _parse_armor(match) if match else None
        if match is None or signature is None or len(signatures) == MAX_SIGNATURES:
            raise malformed(name, content, "an SSH signature", "sign it anew with ssh-keygen -Y sign")
        signatures.append(signature)
        end = match.end()
    return signatures


def _parse_armor(match: re.Match[bytes]) -> Signature | None:
    try:
        blob = base64.b64decode(match[1].replace(b"\n", b""), validate=True)
        version, fields = blob[6:10], list(_strings(blob[10:]))
        key, namespace, _, _, _ = fields
    except ValueError:
        return None
    if not blob.startswith(_MAGIC) or version != b"\0\0\0\1":
        return None
    return Signature(match[0].rstrip(b"\n") + b"\n", key, namespace.decode("utf-8", "replace"))
