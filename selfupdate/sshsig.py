"""SSH signatures (OpenSSH, PROTOCOL.sshsig): `NAME.sig`, verified by `ssh-keygen -Y verify`.

ssh-keygen alone decides whether a signature is good. What it does not do is done
here: it reads the first of several signatures alone, revokes nothing where the
revocation list is empty or was cut behind its head, and mostly does not say why
it refuses. What was checked here is exactly what it gets.
"""

from __future__ import annotations

import hashlib
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from selfupdate.errors import CandidateError, TrustError
from selfupdate.foreign import shown
from selfupdate.signature import Signer, enough, not_enough
from selfupdate.sshformat import (
    Key,
    Signature,
    fingerprint,
    parse_allowed_signers,
    parse_public_keys,
    parse_signatures,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from selfupdate.verifier import Verifier

SUFFIX = ".sig"

_MARK_OF_UTC = re.compile(rb'(valid-(?:after|before)="[0-9]+)Z"')
_KRL_MAGIC = b"SSHKRL\n\0"
_REFUSED = 255
"""The exit status of ssh-keygen for whatever is wrong with a signature."""
_NOT_THE_FILE = (b"incorrect signature", b"invalid format")
"""What it says then of a signature that is not one of this file."""
_SIGN_FOR_THIS = "sign it for this product"
_SIGN_WITH_ANOTHER = "sign it with a key that is valid"


class SshSignatures:
    """The scheme: which files say whom to trust, and who asks."""

    name = "ssh"
    suffix = SUFFIX

    def __init__(self, allowed: Path, revoked: Path | None, namespace: str, required: int, verifier: Verifier) -> None:
        """Trust those in the file `allowed` but for the keys in `revoked`, `required` of them together."""
        self._allowed = allowed
        self._revoked = revoked
        self._namespace = namespace
        self._required = required
        self._verifier = verifier
        self._revocations: tuple[tuple[bytes, bytes], frozenset[bytes]] | None = None

    @property
    def files(self) -> dict[str, Path]:
        """The files that say whom to trust."""
        return {"allowed": self._allowed, **({"revoked": self._revoked} if self._revoked else {})}

    def how_to_sign(self, name: str) -> str:
        """Return the command that makes the signature of a candidate."""
        return f"ssh-keygen -Y sign -f KEY -n {self._namespace} {name}"

    def test(self) -> None:
        """Check with a known answer that ssh-keygen is there and works.

        Raises TrustError. Any wrong verdict counts, and each reason for which it must refuse is tried.
        """
        expired = _TEST_SIGNER.replace(b"namespaces", b'valid-before="20200101",namespaces')
        tries = (
            (_TEST_SIGNER, _TEST_NAMESPACE, _TEST_MESSAGE, True),
            (_TEST_SIGNER, _TEST_NAMESPACE, _TEST_MESSAGE + b".", False),
            (_TEST_SIGNER, "other@self-update", _TEST_MESSAGE, False),
            (expired, _TEST_NAMESPACE, _TEST_MESSAGE, False),
        )
        for allowed, namespace, message, is_good in tries:
            files = {"allowed": allowed, "signature": _TEST_SIGNATURE}
            arguments = ["-Y", "verify", "-f", "allowed", "-I", "self-test", "-n", namespace, "-s", "signature"]
            answer = self._verifier.run(arguments, files, message)
            if (answer.status == 0) is not is_good:
                said = shown(answer.stderr.strip() or answer.stdout.strip(), 200)
                raise TrustError(
                    f"ssh-keygen does not work for this account: {said}",
                    "verifier-unusable",
                    "install OpenSSH 8.9 or newer; this account needs an entry in /etc/passwd",
                )

    def load(self, files: Mapping[str, bytes]) -> SshRoot:
        """Return whom to trust. Raises TrustError where a file is not as it must be."""
        allowed, revoked = files["allowed"], files.get("revoked")
        keys = parse_allowed_signers(allowed)
        if len({key.name for key in keys}) < self._required:
            raise TrustError(
                f"the allowed-signers file lists fewer signers than -signers-required, {self._required}",
                "trust-bad",
                "add a line for each signer",
            )
        # Its times in UTC are marked as such, which OpenSSH knows since 9.1; it runs with UTC as its time zone.
        files = {**files, "allowed": _MARK_OF_UTC.sub(rb'\1"', allowed)}
        return SshRoot(
            keys,
            self._revoked_keys(keys, allowed, revoked) if revoked is not None else frozenset(),
            files,
            self._namespace,
            self._required,
            self._verifier,
        )

    def _revoked_keys(self, keys: list[Key], allowed: bytes, revoked: bytes) -> frozenset[bytes]:
        """Return which of `keys` are revoked; what was found for the same files is remembered."""
        if self._revocations is None or self._revocations[0] != (allowed, revoked):
            find = _revoked_in_krl if revoked.startswith(_KRL_MAGIC) else _revoked_in_text
            self._revocations = ((allowed, revoked), find(keys, revoked, self._verifier))
        return self._revocations[1]


def _unreadable(why: str) -> TrustError:
    return TrustError(
        f"the list of revoked keys cannot be read: {why}",
        "revocation-unreadable",
        "write it anew, or leave -revoked-keys out while no key is revoked",
    )


def _revoked_in_krl(keys: list[Key], revoked: bytes, verifier: Verifier) -> frozenset[bytes]:
    """Ask ssh-keygen which of `keys` a key revocation list names."""
    listing = verifier.run(["-Q", "-l", "-f", "revoked"], {"revoked": revoked})
    entries = [line for line in listing.stdout.splitlines() if line.strip() and not line.startswith(b"#")]
    if listing.status or not entries:  # one that was cut behind its header revokes nothing, without a word
        raise _unreadable(shown(listing.stderr.strip(), 200) if listing.status else "it lists no key")
    files = {f"{number}.pub": key.line for number, key in enumerate(keys)}
    answer = verifier.run(["-Q", "-f", "revoked", *files], {"revoked": revoked, **files})
    verdicts = re.findall(rb"(?m)^([0-9]+)\.pub(?: \([^\n]*\))?: (ok|REVOKED)$", answer.stdout)
    if [int(number) for number, _ in verdicts] != list(range(len(keys))):
        raise _unreadable(shown(answer.stderr.strip(), 200))
    return frozenset(keys[int(number)].key for number, verdict in verdicts if verdict == b"REVOKED")


def _revoked_in_text(_keys: list[Key], revoked: bytes, _verifier: Verifier) -> frozenset[bytes]:
    """Return the public keys in a text file, one a line."""
    try:
        found = parse_public_keys(revoked)
    except ValueError as error:
        raise _unreadable(str(error)) from None
    if not found:
        raise _unreadable("it lists no key")
    return frozenset(found)


class SshRoot:
    """Whom to trust, as the files said when they were read, and as the clock says now."""

    def __init__(
        self,
        keys: list[Key],
        revoked: frozenset[bytes],
        files: Mapping[str, bytes],
        namespace: str,
        required: int,
        verifier: Verifier,
    ) -> None:
        """Keep what was read; `files` is what ssh-keygen will read, too."""
        self._keys = {key.key: key for key in keys}
        self._revoked = revoked
        self._files = files
        self._namespace = namespace
        self._required = required
        self._verifier = verifier
        self._faults = {key.key: self._fault_of(key, time.time()) for key in keys}
        codes = [fault.code if fault else None for fault in self._faults.values()]
        self.state = hashlib.sha256(repr((sorted(files.items()), namespace, required, codes)).encode()).digest()
        """The digest of all that a verdict depends on, besides the file and its signature."""

    def examine(self, signature: bytes, name: str) -> None:
        """Check a signature file as far as that goes without the signed file. Raises CandidateError."""
        self._usable(parse_signatures(signature, name))

    def verify(self, path: Path, signature: bytes, name: str) -> list[Signer]:
        """Return whose signatures of `path` are good, when they are enough. Raises CandidateError."""
        usable, refusals = self._usable(parse_signatures(signature, name))
        signers: list[Signer] = []
        for one, key in usable:
            try:
                signers.append(self._verify(path, one, key))
            except CandidateError as error:
                refusals.append(error)
            if enough(signers, self._required):
                return signers
        raise not_enough(signers, self._required, refusals)

    def fault_of(self, fingerprint_of_key: str) -> CandidateError | None:
        """Return why a key would not be trusted now, or None."""
        for blob, fault in self._faults.items():
            if fingerprint(blob) == fingerprint_of_key:
                return fault
        return _untrusted(fingerprint_of_key)

    def _usable(self, signatures: list[Signature]) -> tuple[list[tuple[Signature, Key]], list[CandidateError]]:
        """Return the signatures by keys that may sign, and why the others may not. Raises where they are too few."""
        usable: list[tuple[Signature, Key]] = []
        refusals: list[CandidateError] = []
        for signature in signatures:
            key = self._keys.get(signature.key)
            if signature.namespace != self._namespace:
                what = shown(signature.namespace, 128)
                refusals.append(
                    CandidateError(f"signed for {what}, not for {self._namespace}", "wrong-product", _SIGN_FOR_THIS)
                )
            elif key is None:
                refusals.append(_untrusted(fingerprint(signature.key)))
            elif (fault := self._faults[key.key]) is not None:
                refusals.append(fault)
            else:
                usable.append((signature, key))
        signers = [Signer(key.name, fingerprint(key.key)) for _, key in usable]
        if not enough(signers, self._required):
            raise not_enough(signers, self._required, refusals)
        return usable, refusals

    def _fault_of(self, key: Key, now: float) -> CandidateError | None:
        if key.key in self._revoked:
            return CandidateError(f"the key of {key.name} has been revoked", "key-revoked", _SIGN_WITH_ANOTHER)
        if self._namespace not in key.namespaces:
            return CandidateError(
                f"{key.name} may not sign for {self._namespace}", "key-not-for-product", _SIGN_WITH_ANOTHER
            )
        if key.after is not None and now < key.after:
            return CandidateError(f"the key of {key.name} is not valid before {_date(key.after)}", "key-not-yet-valid")
        if key.before is not None and now > key.before:
            return CandidateError(
                f"the key of {key.name} is no longer valid, since {_date(key.before)}",
                "key-expired",
                _SIGN_WITH_ANOTHER,
            )
        return None

    def _verify(self, path: Path, signature: Signature, key: Key) -> Signer:
        """Let ssh-keygen decide. Its words are checked, too: it must have decided about this key."""
        arguments = ["-Y", "verify", "-f", "allowed", "-I", key.name, "-n", self._namespace, "-s", "signature"]
        arguments += ["-r", "revoked"] if "revoked" in self._files else []
        answer = self._verifier.run(arguments, {**self._files, "signature": signature.armored}, path)
        good = f'Good "{self._namespace}" signature for {key.name} with '
        said = answer.stdout.decode("utf-8", "replace")
        is_good = said.startswith(good) and said.endswith(f" key {fingerprint(key.key)}\n") and said.count("\n") == 1
        if answer.status == 0 and is_good:
            return Signer(key.name, fingerprint(key.key))
        if answer.status == _REFUSED and any(word in answer.stderr for word in _NOT_THE_FILE):
            raise CandidateError(
                f"is not the file that {key.name} signed: it was altered, or copied badly",
                "signature-mismatch",
                "copy it and its signature again",
            )
        raise self._verifier.no_answer(answer)


def _untrusted(key: str) -> CandidateError:
    return CandidateError(f"signed with a key that is not trusted here: {key}", "untrusted-key", _SIGN_WITH_ANOTHER)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# A key that was made for this, and thrown away.
_TEST_NAMESPACE = "self-test@self-update"
_TEST_MESSAGE = b"self-update"
_TEST_SIGNER = (
    b'self-test namespaces="self-test@self-update" '
    b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE/NWljxfV1Hcv00p6voyGo/x89VKYXzWWU0AC2FDR3k\n"
)
_TEST_SIGNATURE = b"""\
-----BEGIN SSH SIGNATURE-----
U1NIU0lHAAAAAQAAADMAAAALc3NoLWVkMjU1MTkAAAAgT81aWPF9XUdy/TSnq+jIaj/Hz1
UphfNZZTQALYUNHeQAAAAVc2VsZi10ZXN0QHNlbGYtdXBkYXRlAAAAAAAAAAZzaGE1MTIA
AABTAAAAC3NzaC1lZDI1NTE5AAAAQH+WQkcFdc+mEn6NacrFKBJjkrq0LfCz6Eo2X05+vo
RZFiGC5TAHvTpVtVFPA+T8ctOFpn+6ULbi39Yx4K9qygc=
-----END SSH SIGNATURE-----
"""
