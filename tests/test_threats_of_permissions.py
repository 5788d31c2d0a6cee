"""Threats to what says whom to trust: faults in it, and others who can change it."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import TYPE_CHECKING

import pytest
from keys import FOR_US, SshKeys

from selfupdate.access import read_token
from selfupdate.errors import SelfUpdateError, StartError, StateError, TrustError
from selfupdate.state import StateDirectory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

from signed import Site, need_root, write

YEAR = 365 * 24 * 60 * 60
FLAGS = ("-probation", "100ms", "-drain", "2s")


# ---- rows 26 and 27: whom to trust ----


@pytest.mark.parametrize(
    "line",
    [
        "*",
        "*@example.org",
        "alice,bob",
        "alice bob",
        "no namespaces",
        "empty namespaces",
        "any namespace",
        "local time",
        "no time",
        "no such day",
        "an option twice",
        "an unknown option",
        "a comma behind the options",
        "cert-authority",
        "the same key again",
        "BOM",
        "NUL",
        "garbage",
        "RSA-1024",
        "RSA-2048",
        "DSA",
        "cut key",
        "another type",
    ],
)
def test_a_fault_in_the_list_of_signers(site: Site, ssh: SshKeys, line: str) -> None:
    """Row 26. The tool passes over a faulty line in silence, or reads it in its own way: here it is an error."""
    site.allow("# who may sign\n", ssh.key("alice").line(), _faulty(ssh, line))
    assert "has a fault in line 3: " in str(site.assert_off("trust-bad"))


def _faulty(ssh: SshKeys, fault: str) -> bytes:
    bob = ssh.key("bob")
    kind, key = bob.public.split()
    lines = {
        "no namespaces": f"bob {bob.public}",
        "empty namespaces": bob.line('namespaces=""'),
        "any namespace": bob.line('namespaces="*"'),
        "local time": bob.line(f'{FOR_US},valid-before="20991231"'),
        "no time": bob.line(f'{FOR_US},valid-before="forever"'),
        "no such day": bob.line(f'{FOR_US},valid-before="20990230Z"'),
        "an option twice": bob.line(f"{FOR_US},{FOR_US}"),
        "an unknown option": bob.line(f"{FOR_US},no-touch-required"),
        "a comma behind the options": bob.line(f"{FOR_US},"),
        "cert-authority": bob.line(f"cert-authority,{FOR_US}"),
        "the same key again": ssh.key("alice").line(name="bob"),
        "BOM": f"\ufeff{bob.line()}",
        "NUL": f"{bob.line().rstrip()}\0\n",
        "garbage": "it was a dark and stormy night",
        "RSA-1024": ssh.key("weak", "rsa", 1024).line() if fault == "RSA-1024" else "",
        "RSA-2048": ssh.key("weak", "rsa", 2048).line() if fault == "RSA-2048" else "",
        "DSA": ssh.key("old", "dsa").line() if fault == "DSA" else "",
        "cut key": f"bob {FOR_US} {kind} {key[:-8]}",
        "another type": f"bob {FOR_US} ssh-rsa {key}",
    }
    return lines.get(fault, bob.line(name=fault)).encode()


def test_a_byte_order_mark_at_the_beginning(site: Site, ssh: SshKeys) -> None:
    """Row 26. The first signer would vanish without a word."""
    site.allow(b"\xef\xbb\xbf", ssh.key("alice").line(), ssh.key("bob").line())
    assert "has a fault in line 1: it has a byte that is not ASCII" in str(site.assert_off("trust-bad"))


@pytest.mark.parametrize("content", ["", "\n\n", "# nobody\n"])
def test_an_empty_list_of_signers(site: Site, content: str) -> None:
    """Row 26. An empty list is nobody, and never everybody."""
    site.allow(content)
    site.assert_off("trust-empty")


def test_no_list_of_signers(site: Site) -> None:
    """Row 26. A list that was configured and is not there is an error."""
    site.allowed.unlink()
    site.assert_off("trust-bad")


def test_a_list_of_signers_where_candidates_are(site: Site) -> None:
    """Row 27. Who may write candidates must not say whom to trust."""
    inside = site.upgrades / "allowed_signers"
    write(inside, site.allowed.read_bytes())
    site.assert_off("trust-permissions", "-allowed-signers", str(inside))
    (site.directory / "link").symlink_to(site.upgrades)
    site.assert_off("trust-permissions", "-allowed-signers", str(site.directory / "link" / "allowed_signers"))


class Relied:
    """What the service relies on, below two directories of its own, `above` and `beside`; and how it uses it."""

    def __init__(self, site: Site, what: str, content: bytes) -> None:
        self._site = site
        self._what = what
        self.above = site.directory / "above"
        self.beside = self.above / "beside"
        self.path = self.beside / "it"
        for path in (self.above, self.beside):
            path.mkdir()
            path.chmod(0o755)
        if what == "state":
            self.path.mkdir(mode=0o700)
        else:
            write(self.path, content)
            self.path.chmod(0o600)

    @property
    def is_state(self) -> bool:
        return self._what == "state"

    def use(self, path: Path | None = None) -> None:
        """Use it as the service does, under another path if one is given. Raises SelfUpdateError."""
        path = path or self.path
        if self._what == "token":
            read_token(path)
        elif self._what == "state":
            state = StateDirectory(path)
            state.open()
            os.close(state.lock_fd)
        else:
            pinned = ("-signer", "A" * 40) if self._what == "keyring" else ()
            self._site.trust(f"-{self._what}", str(path), *pinned).read()

    def refusal(self, path: Path | None = None) -> SelfUpdateError:
        """Return the error that its use raises, which must be the one for what others can change."""
        kind, code = {"token": (StartError, None), "state": (StateError, "staging-permissions")}.get(
            self._what, (TrustError, "trust-permissions")
        )
        with pytest.raises(kind) as caught:
            self.use(path)
        assert caught.value.code == code
        return caught.value


@pytest.fixture(params=["allowed-signers", "revoked-keys", "keyring", "token", "state"])
def relied(request: pytest.FixtureRequest, site: Site, ssh: SshKeys, tool: Callable[[str], str]) -> Relied:
    """Each thing that the service relies on, which nobody else may change."""
    if request.param == "keyring":
        tool("gpgv")
    contents = {
        "allowed-signers": site.allowed.read_bytes(),
        "revoked-keys": ssh.krl(ssh.key("mallory")),
        "keyring": b"keys",
        "token": b"x" * 32,
    }
    found = Relied(site, request.param, contents.get(request.param, b""))
    found.use()
    return found


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
@pytest.mark.parametrize("which", ["path", "beside", "above"])
def test_what_others_can_change(relied: Relied, which: str, mode: int) -> None:
    """Row 27. Neither it nor a directory above it may be written by others; the remedy is the command that mends it."""
    path: Path = getattr(relied, which)
    path.chmod(mode)
    error = relied.refusal()
    who = "everybody" if mode & 0o002 else "its group"
    assert f"{path} can be changed by {who}" in str(error)
    _mend(error)
    relied.use()


@pytest.mark.parametrize("which", ["path", "beside", "above"])
def test_what_belongs_to_another_account(relied: Relied, which: str) -> None:
    """Row 27. Its owner could change it at any time, and so could that of a directory above it."""
    need_root()
    path: Path = getattr(relied, which)
    os.chown(path, 65534, 65534)
    error = relied.refusal()
    assert f"{path} belongs to another account, uid 65534" in str(error)
    _mend(error)
    relied.use()


def _mend(error: SelfUpdateError) -> None:
    """Do as the remedy says."""
    subprocess.run(shlex.split(error.remedy or str(error).rpartition("; ")[2]), check=True)


def test_what_is_a_symbolic_link(relied: Relied) -> None:
    """Row 27. What is relied on is named itself; service managers make the state directory a link, which may be."""
    link = relied.above / "link"
    link.symlink_to(relied.path)
    if relied.is_state:
        relied.use(link)
    else:
        assert "is a symbolic link" in str(relied.refusal(link))


def test_a_link_above_to_what_others_can_change(relied: Relied) -> None:
    """Row 27. Where a link leads is looked at, too."""
    safe = relied.above.parent / "safe"
    safe.mkdir(mode=0o700)
    (safe / "link").symlink_to(relied.beside)
    relied.use(safe / "link" / "it")
    relied.above.chmod(0o777)
    assert f"{relied.above} can be changed by everybody" in str(relied.refusal(safe / "link" / "it"))


def test_what_is_below_a_directory_like_tmp(relied: Relied) -> None:
    """Row 27. Where nobody can rename what is not theirs, a directory of one's own is safe, and a lone file is not."""
    need_root()
    relied.above.chmod(0o1777)
    relied.use()
    os.chown(relied.above, 65534, 65534)  # but for its owner, who can
    assert "belongs to another account" in str(relied.refusal())
    os.chown(relied.above, 0, 0)
    relied.path.rename(relied.above / "it")
    if (relied.above / "it").is_dir():
        relied.use(relied.above / "it")
    else:
        assert f"{relied.above} can be changed by everybody" in str(relied.refusal(relied.above / "it"))


def test_a_state_directory_that_is_like_tmp(relied: Relied) -> None:
    """Row 27. What is sticky and written by all is nobody's own, when it is the thing itself."""
    relied.path.chmod(0o1777)
    assert "can be changed by everybody" in str(relied.refusal())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_token_that_others_can_read(tmp_path: Path, mode: int) -> None:
    """Row 27. A secret is one only when nobody else can read it."""
    path = tmp_path / "token"
    path.write_bytes(b"x" * 32)
    path.chmod(mode)
    with pytest.raises(StartError, match="can be read by others; chmod 600 ") as caught:
        read_token(path)
    _mend(caught.value)
    assert read_token(path) == "x" * 32


def test_a_loop_of_links(site: Site) -> None:
    """Row 27. A path that leads to nothing turns upgrades off, and is no defect."""
    (site.directory / "loop").symlink_to("loop")
    site.allowed.unlink()
    site.allowed.symlink_to("loop")
    site.assert_off("trust-permissions")
    site.allowed.unlink()
    site.allowed = site.directory / "loop" / "signers"
    site.assert_off("trust-bad")
