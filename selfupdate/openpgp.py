"""OpenPGP signatures: `NAME.asc`, verified by `gpgv`.

Its exit status is 0 for an expired or revoked key, too, and for a signature from
the future; its words on standard error hold what a signature says of itself. So
the verdict is read from the status lines alone (GnuPG, doc/DETAILS), which it
writes to a descriptor of their own, and any line that speaks against a signature
refuses them all. Who may sign is a list of fingerprints of primary keys: a keyring
often holds more keys than that, and OpenPGP does not say what a signature is for.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from typing import TYPE_CHECKING

from selfupdate.errors import CandidateError, TrustError
from selfupdate.foreign import shown
from selfupdate.signature import Signer, enough, malformed, not_enough
from selfupdate.verifier import STATUS_FD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from selfupdate.verifier import Answer, Verifier

SUFFIX = ".asc"

_ARMOR = re.compile(rb"\s*(?:-----BEGIN PGP SIGNATURE-----\r?\n(?:[^-]|-(?!----))*\n-----END PGP SIGNATURE-----\s*)+")
_TIME_SLIP = 5 * 60
# Fingerprint, date, time, expiry, version, reserved, algorithm, hash, class, primary key. The hash must be one of
# SHA-256, SHA-384 and SHA-512 (RFC 9580, section 9.5), the class that of a binary document.
_VALIDSIG = re.compile(
    r"[0-9A-F]{40,64} [0-9-]{10} (?P<time>[0-9]{1,12}) [0-9T]+ [0-9]+ [0-9]+ [0-9]+ (8|9|10) 00 "
    r"(?P<primary>[0-9A-F]{40,64})"
)
_WITH_ANOTHER = "sign it with a key that is valid"
_AGAIN = "sign it anew with gpg --detach-sign --armor"

# What speaks against a signature: the code and the text of its refusal.
_AGAINST = {
    "BADSIG": ("signature-mismatch", "is not the file that was signed: it was altered, or copied badly"),
    "REVKEYSIG": ("key-revoked", "is signed with a key that has been revoked"),
    "KEYREVOKED": ("key-revoked", "is signed with a key that has been revoked"),
    "EXPKEYSIG": ("key-expired", "is signed with a key that is no longer valid"),
    "KEYEXPIRED": ("key-expired", "is signed with a key that is no longer valid"),
    "EXPSIG": ("signature-expired", "has a signature that is no longer valid"),
    "SIGEXPIRED": ("signature-expired", "has a signature that is no longer valid"),
    "NO_PUBKEY": ("untrusted-key", "is signed with a key that is not trusted here"),
    "ERRSIG": ("untrusted-key", "is signed with a key that is not trusted here"),
    "NODATA": ("signature-malformed", "has no OpenPGP signature beside it"),
    "BADARMOR": ("signature-malformed", "has no OpenPGP signature beside it"),
    "UNEXPECTED": ("signature-malformed", "has no OpenPGP signature beside it"),
    "FAILURE": ("verifier-error", "could not be checked"),
    "ERROR": ("verifier-error", "could not be checked"),
}


def judge(status: bytes, signers: Sequence[str], now: float) -> list[Signer]:
    """Return who of `signers`, fingerprints of primary keys, made a good signature, from gpgv's status lines.

    Raises CandidateError where any signature is not good.
    """
    lines = [line.split(" ") for line in status.decode("utf-8", "replace").split("\n") if line]
    if any(line[0] != "[GNUPG:]" or len(line) < 2 for line in lines):  # noqa: PLR2004 - the mark, and a keyword
        raise _refusal("FAILURE")
    words = [line[1] for line in lines]
    if "NO_PUBKEY" not in words and any(_is_ahead(line[6:7], now) for line in lines if line[1] == "ERRSIG"):
        raise _from_the_future()
    for word in _AGAINST:  # in the order of the table: what says most first
        if word in words:
            key = next((line[2] for line in lines if line[1] == word and len(line) > 2), "")  # noqa: PLR2004 - as above
            raise _refusal(word, shown(key, 64) if word in {"NO_PUBKEY", "ERRSIG"} else "")
    valid = [line[2:] for line in lines if line[1] == "VALIDSIG"]
    if not valid or not len(valid) == words.count("GOODSIG") == words.count("NEWSIG"):
        raise _refusal("FAILURE")
    found = []
    for fields in valid:
        match = _VALIDSIG.fullmatch(" ".join(fields))
        if match is None:
            why = "has a signature of a kind that is not taken here"
            raise CandidateError(why, "signature-malformed", _AGAIN)
        if _is_ahead([match["time"]], now):
            raise _from_the_future()
        if match["primary"] not in signers:
            raise _refusal("NO_PUBKEY", match["primary"])
        found.append(Signer(match["primary"], match["primary"]))
    return found


def _is_ahead(times: list[str], now: float) -> bool:
    """Tell whether any of `times`, seconds since the epoch as gpgv writes them, has not come yet."""
    return any(text.isascii() and text.isdigit() and float(text) > now + _TIME_SLIP for text in times)


def _from_the_future() -> CandidateError:
    return CandidateError("has a signature, or a key, from the future", "key-not-yet-valid", "set the clock")


def _refusal(word: str, key: str = "") -> CandidateError:
    code, text = _AGAINST[word]
    remedy = {"signature-mismatch": "copy it and its signature again", "signature-malformed": _AGAIN}
    return CandidateError(text + (f": {key}" if key else ""), code, remedy.get(code, _WITH_ANOTHER))


class OpenPgpSignatures:
    """The scheme: which keyring and which keys, and who asks."""

    name = "openpgp"
    suffix = SUFFIX

    def __init__(self, keyring: Path, signers: Sequence[str], required: int, verifier: Verifier) -> None:
        """Trust the keys in `keyring` whose fingerprints are `signers`, `required` of them together."""
        self._keyring = keyring
        self._signers = signers
        self._required = required
        self._verifier = verifier

    @property
    def files(self) -> dict[str, Path]:
        """The files that say whom to trust."""
        return {"keyring": self._keyring}

    def how_to_sign(self, name: str) -> str:
        """Return the command that makes the signature of a candidate."""
        return f"gpg --detach-sign --armor {name}"

    def test(self) -> None:
        """Check with a known answer that gpgv is there and works. Raises TrustError."""
        for message, is_good in ((_TEST_MESSAGE, True), (_TEST_MESSAGE + b".", False)):
            answer = _ask(self._verifier, _TEST_KEYRING, _TEST_SIGNATURE, message)
            try:
                found = answer.status == 0 and bool(judge(answer.on_status_fd, [_TEST_KEY], time.time()))
            except CandidateError:
                found = False
            if found is not is_good:
                said = shown(answer.stderr.strip(), 200)
                raise TrustError(
                    f"gpgv does not work for this account: {said}", "verifier-unusable", "install gpgv 2.2 or newer"
                )

    def load(self, files: Mapping[str, bytes]) -> OpenPgpRoot:
        """Return whom to trust. Raises TrustError where the file is no keyring."""
        content = files["keyring"]
        if not content:
            raise TrustError(f"the keyring {self._keyring} is empty", "trust-empty", "export the signers' keys to it")
        if content.startswith(b"-----BEGIN"):
            raise TrustError(
                f"the keyring {self._keyring} is armored, which gpgv does not read", "trust-bad", "gpg --dearmor it"
            )
        return OpenPgpRoot(content, self._signers, self._required, self._verifier)


class OpenPgpRoot:
    """Whom to trust, as the keyring was when it was read."""

    def __init__(self, keyring: bytes, signers: Sequence[str], required: int, verifier: Verifier) -> None:
        """Keep what was read."""
        self._keyring = keyring
        self._signers = signers
        self._required = required
        self._verifier = verifier

    @property
    def state(self) -> bytes:
        """All that a verdict depends on, besides the file and its signature; the minute, since keys expire."""
        digest = hashlib.sha256(self._keyring).hexdigest()
        return f"{digest} {self._signers} {self._required} {time.time() // 60}".encode()

    def examine(self, signature: bytes, name: str) -> None:
        """Check a signature file as far as that goes without the signed file. Raises CandidateError."""
        if not _ARMOR.fullmatch(signature):
            raise malformed(name, signature, "an OpenPGP signature", _AGAIN)

    def verify(self, path: Path, signature: bytes, name: str) -> list[Signer]:
        """Return whose signatures of `path` are good, when they are enough. Raises CandidateError."""
        self.examine(signature, name)
        answer = _ask(self._verifier, self._keyring, signature, path)
        signers = judge(answer.on_status_fd, self._signers, time.time())
        if answer.status:
            raise self._verifier.no_answer(answer)
        if not enough(signers, self._required):
            raise not_enough(signers, self._required, [])
        return signers

    def fault_of(self, key: str) -> CandidateError | None:
        """Return why a key would not be trusted now, or None: what expires or is revoked is in the keyring alone."""
        if key in self._signers:
            return None
        return CandidateError(f"signed with a key that is not trusted here: {key}", "untrusted-key")


def _ask(verifier: Verifier, keyring: bytes, signature: bytes, data: Path | bytes) -> Answer:
    """Have gpgv check a detached signature: always with two names, or it takes a message for its own signature."""
    arguments = ["--status-fd", STATUS_FD, "--homedir", ".", "--keyring", "./keyring", "--", "signature", "-"]
    return verifier.run(arguments, {"keyring": keyring, "signature": signature}, data)


# A key that was made for this, and thrown away.
_TEST_MESSAGE = b"self-update"
_TEST_KEY = "2202FC94C7EFE8521C6C5C2F23FB360659615C99"
_TEST_KEYRING = base64.b64decode(
    "mDMEXgvhABYJKwYBBAHaRw8BAQdAhcQ3Os3DIb7+ljTd3wDFALDvYdZei+MVcXc2iK8lnTu0CXNlbGYtdGVzdIiQBBMWCAA4FiEE"
    "IgL8lMfv6FIcbFwvI/s2BllhXJkFAl4L4QACGwMFCwkIBwIGFQoJCAsCBBYCAwECHgECF4AACgkQI/s2BllhXJmOPwD8CR/MAfEW"
    "OeZi/jprgqsiW7Pqj5KwomF97fKz0Tr83bABALKeFYJSNdXTjhUSbqRc8zfQTiI+ktvJf3vvPkWw/i0O"
)
_TEST_SIGNATURE = b"""\
-----BEGIN PGP SIGNATURE-----

iHUEABYIAB0WIQQiAvyUx+/oUhxsXC8j+zYGWWFcmQUCXgvhAAAKCRAj+zYGWWFc
mSKBAPwLybHPrbAf8zCEK2KOi2TUdI1PaGq4Mbu16Xsxr5bfXAEA1IKfUO3MSt/H
FIBF1ymqQG58YfNrhMGnkdjOId5lrQk=
-----END PGP SIGNATURE-----
"""
