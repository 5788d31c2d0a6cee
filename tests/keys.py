"""Real keys for the tests, made anew for each run with the platform's own tools: SSH's, and OpenPGP's."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMESPACE = "release@self-update"
FOR_US = f'namespaces="{NAMESPACE}"'
"""The options of a line of allowed signers that say what the service's releases are signed for."""

_NOT_NOW = {"GNUPGHOME", "GPG_AGENT_INFO", "SSH_AUTH_SOCK", "SSH_ASKPASS", "DISPLAY"}
"""Variables that lead to somebody's own keys, or ask a person."""


def _run(command: Sequence[str | Path], data: bytes = b"", **environ: str) -> bytes:
    """Return what a tool prints; the test fails with its own words where it fails."""
    environ = {**{name: text for name, text in os.environ.items() if name not in _NOT_NOW}, **environ}
    ran = subprocess.run(command, input=data, capture_output=True, env=environ, check=False)
    assert ran.returncode == 0, (command, ran.stderr.decode())
    return ran.stdout


@dataclass(frozen=True)
class SshKey:
    """A pair of keys, and whose it is."""

    name: str
    path: Path
    """Of the private key; the public one stands beside it."""

    @property
    def public(self) -> str:
        """The public key, without a comment: its type and itself."""
        return " ".join(self.path.with_suffix(".pub").read_text(encoding="ascii").split()[:2])

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(base64.b64decode(self.public.split()[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    def line(self, options: str = FOR_US, name: str | None = None) -> str:
        """Return the line of the allowed-signers file that lets it sign."""
        return f"{name or self.name} {options} {self.public}\n"

    def sign(self, data: bytes, namespace: str = NAMESPACE) -> bytes:
        return _run(["ssh-keygen", "-q", "-Y", "sign", "-f", self.path, "-n", namespace], data)


class SshKeys:
    """SSH keys by the name of whose they are, each made once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def key(self, name: str, kind: str = "ed25519", bits: int | None = None) -> SshKey:
        path = self._directory / f"{name}-{kind}-{bits or 'default'}"
        if not path.exists():
            size = [] if bits is None else ["-b", str(bits)]
            _run(["ssh-keygen", "-q", "-t", kind, *size, "-N", "", "-C", name, "-f", path])
        return SshKey(name, path)

    def krl(self, *keys: SshKey) -> bytes:
        """Return a key revocation list that names the keys."""
        path = self._directory / "krl"
        path.unlink(missing_ok=True)
        _run(["ssh-keygen", "-q", "-k", "-f", path, *(key.path.with_suffix(".pub") for key in keys)])
        return path.read_bytes()


class OpenPgpKeys:
    """OpenPGP keys by the name of whose they are, each made once, with an agent that ends with them."""

    def __init__(self) -> None:
        # Not below the tests' own directory: the agent listens on a socket there, whose path may have 107 bytes.
        self._home = Path(tempfile.mkdtemp(prefix="gpg-"))
        self._keys: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._keys:
            _run(["gpgconf", "--kill", "all"], GNUPGHOME=str(self._home))
        shutil.rmtree(self._home, ignore_errors=True)

    def key(self, name: str, expires: str = "never", at: str | None = None) -> str:
        """Return the fingerprint of the key of `name`, made at the time `at`, such as `20200101T000000`."""
        if name not in self._keys:
            self._gpg(["--quick-gen-key", name, "ed25519", "sign", expires], at=at)
            self._keys[name] = self._fingerprint(name)
        return self._keys[name]

    def add_subkey(self, name: str) -> None:
        """Give a key another one that signs in its place."""
        self._gpg(["--quick-add-key", self.key(name), "ed25519", "sign", "never"])

    def revoke(self, name: str) -> None:
        """Revoke a key with the certificate that was made with it."""
        certificate = (self._home / "openpgp-revocs.d" / f"{self.key(name)}.rev").read_text(encoding="utf-8")
        self._gpg(["--import"], certificate.replace(":-----BEGIN", "-----BEGIN").encode())

    def keyring(self, *names: str, armored: bool = False) -> bytes:
        """Return the public keys as the service's keyring holds them."""
        return self._gpg([*(["--armor"] if armored else []), "--export", *map(self.key, names)])

    def sign(
        self, data: bytes, *names: str, options: Sequence[str] = ("--detach-sign",), at: str | None = None
    ) -> bytes:
        """Return the armored signatures of all `names` in one block, made at the time `at`."""
        signers = [word for name in names for word in ("--local-user", self.key(name))]
        return self._gpg([*signers, "--armor", *options], data, at=at)

    def dearmored(self, content: bytes) -> bytes:
        return self._gpg(["--dearmor"], content)

    def _fingerprint(self, name: str) -> str:
        listing = self._gpg(["--with-colons", "--list-keys", f"={name}"]).decode()
        return next(line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr:"))

    def _gpg(self, arguments: Sequence[str], data: bytes = b"", at: str | None = None) -> bytes:
        time = ["--faked-system-time", f"{at}!"] if at else []
        quiet = ["--batch", "--quiet", "--no-tty", "--no-auto-check-trustdb", "--ignore-time-conflict"]
        secret = ["--pinentry-mode", "loopback", "--passphrase", ""]
        return _run(["gpg", *quiet, *secret, *time, *arguments], data, GNUPGHOME=str(self._home))
