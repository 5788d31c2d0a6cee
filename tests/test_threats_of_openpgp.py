"""Threats that OpenPGP signatures answer, and gpgv's status lines, which tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from programs import write_program

from selfupdate import verifier
from selfupdate.errors import CandidateError
from selfupdate.openpgp import judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from keys import OpenPgpKeys, SshKeys

from signed import Site, double, write

YEAR = 365 * 24 * 60 * 60
FLAGS = ("-probation", "100ms", "-drain", "2s")


# ---- OpenPGP ----


class OpenPgpSite:
    """The same for OpenPGP: alice and bob may sign; carol's key is in the keyring, too."""

    def __init__(self, site: Site, keys: OpenPgpKeys) -> None:
        self.site = site
        self.keys = keys
        self.signature = site.upgrades / "app.asc"
        self.pin("alice", "bob")
        self.sign("alice")

    def pin(self, *names: str, others: tuple[str, ...] = ("carol",)) -> None:
        """Put keys into the keyring, and say that they may sign; `others` are there, and may not."""
        write(self.site.keyring, self.keys.keyring(*names, *others))
        pinned = ",".join(map(self.keys.key, names))
        self.flags: tuple[str, ...] = ("-keyring", str(self.site.keyring), "-signer", pinned)

    def sign(self, *names: str) -> None:
        self.signature.write_bytes(self.keys.sign(self.site.content, *names))

    def assert_accepted(self, *names: str, required: int = 1) -> None:
        signer = ", ".join(sorted(map(self.keys.key, names)))
        self.site.assert_accepted(*self.flags, "-signers-required", str(required), signer=signer)

    def assert_refused(self, code: str, required: int = 1) -> str:
        return self.site.assert_refused(code, *self.flags, "-signers-required", str(required))


@pytest.fixture
def pgp(bare: Site, gpg: OpenPgpKeys) -> OpenPgpSite:
    """Make a candidate that alice, who may, has signed with her OpenPGP key."""
    return OpenPgpSite(bare, gpg)


def test_a_good_open_pgp_signature(pgp: OpenPgpSite) -> None:
    """It is asked for its version, which is shown with its signer's fingerprint."""
    pgp.assert_accepted("alice")


def test_an_open_pgp_signature_by_a_subkey(pgp: OpenPgpSite) -> None:
    """Whose signature it is, the primary key says, whichever of its keys made it."""
    pgp.keys.add_subkey("sub")
    pgp.pin("sub")
    pgp.sign("sub")
    pgp.assert_accepted("sub")


def test_an_open_pgp_signature_of_another_file(pgp: OpenPgpSite) -> None:
    """A changed file is not the one that was signed."""
    write_program(pgp.site.candidate, pgp.site.program("3.0.0"))
    pgp.assert_refused("signature-mismatch")


@pytest.mark.parametrize("name", ["mallory", "carol"])
def test_an_open_pgp_signature_by_somebody_else(pgp: OpenPgpSite, name: str) -> None:
    """An unknown key, and one that is in the keyring and is not one of those that may sign."""
    pgp.sign(name)
    assert pgp.keys.key(name)[-16:] in pgp.assert_refused("untrusted-key")


def test_an_open_pgp_key_that_has_expired(pgp: OpenPgpSite) -> None:
    """To the tool, a signature that it made in its time is good; here it is not."""
    pgp.keys.key("old", expires="1y", at="20200101T000000")
    pgp.signature.write_bytes(pgp.keys.sign(pgp.site.content, "old", at="20200201T000000"))
    pgp.pin("old", "alice")
    pgp.assert_refused("key-expired")


def test_an_open_pgp_key_that_was_revoked(pgp: OpenPgpSite) -> None:
    """The same for what it signed before it was revoked."""
    pgp.pin("gone")
    pgp.sign("gone")
    pgp.assert_accepted("gone")
    pgp.keys.revoke("gone")
    pgp.pin("gone", "alice")
    pgp.assert_refused("key-revoked")


def test_an_open_pgp_signature_from_the_future(pgp: OpenPgpSite) -> None:
    """Row 70. Made tomorrow, or today with a clock that is behind: refused, and the text says which it may be."""
    pgp.signature.write_bytes(pgp.keys.sign(pgp.site.content, "alice", at="20900101T000000"))
    assert "from the future" in pgp.assert_refused("key-not-yet-valid")


def test_an_open_pgp_key_from_the_future(pgp: OpenPgpSite) -> None:
    """Row 70. The same where the key itself is younger than the clock says."""
    pgp.keys.key("ahead", at="20900101T000000")
    pgp.signature.write_bytes(pgp.keys.sign(pgp.site.content, "ahead", at="20900201T000000"))
    pgp.pin("ahead")
    pgp.assert_refused("key-not-yet-valid")


def test_an_open_pgp_signature_that_has_expired(pgp: OpenPgpSite) -> None:
    """A signature can have an end of its own."""
    pgp.keys.key("early", at="20200101T000000")
    options = ("--default-sig-expire", "1d", "--detach-sign")
    pgp.signature.write_bytes(pgp.keys.sign(pgp.site.content, "early", options=options, at="20200201T000000"))
    pgp.pin("early")
    pgp.assert_refused("signature-expired")


@pytest.mark.parametrize(
    "options", [("--digest-algo", "SHA1"), ("--digest-algo", "RIPEMD160"), ("--textmode",)], ids=" ".join
)
def test_an_open_pgp_signature_of_a_weak_kind(pgp: OpenPgpSite, options: tuple[str, ...]) -> None:
    """A digest that can be forged, and one of text whose line ends do not count, are not taken."""
    pgp.signature.write_bytes(pgp.keys.sign(pgp.site.content, "alice", options=(*options, "--detach-sign")))
    pgp.assert_refused("signature-malformed")


@pytest.mark.parametrize("form", ["one block", "two blocks"])
def test_two_open_pgp_signers(pgp: OpenPgpSite, form: str) -> None:
    """Row 19. In one armored block, as one command makes it, or in one behind another."""
    if form == "one block":
        pgp.sign("alice", "bob")
    else:
        pgp.signature.write_bytes(b"".join(pgp.keys.sign(pgp.site.content, name) for name in ("alice", "bob")))
    pgp.assert_accepted("alice", "bob", required=2)


@pytest.mark.parametrize(
    ("signed", "code"),
    [
        ("alice", "not-enough-signers"),
        ("alice + alice", "not-enough-signers"),
        ("alice + mallory", "untrusted-key"),
        ("mallory + alice", "untrusted-key"),
        ("alice + carol", "untrusted-key"),
    ],
)
def test_too_few_open_pgp_signers(pgp: OpenPgpSite, signed: str, code: str) -> None:
    """Row 19. One is not two, twice one is not, and what is not good beside it refuses them all."""
    pgp.signature.write_bytes(b"".join(pgp.keys.sign(pgp.site.content, name) for name in signed.split(" + ")))
    pgp.assert_refused(code, required=2)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda _: b"", "signature-empty"),
        (lambda good: good[:-40], "signature-malformed"),
        (lambda good: good + b"junk\n", "signature-malformed"),
        (lambda good: b"junk\n" + good, "signature-malformed"),
        (lambda good: good + b"\0", "signature-malformed"),
        (lambda good: good + good[:100], "signature-malformed"),
        (lambda good: good.replace(b"\n", b"\r\n"), None),
        (lambda good: good.replace(b"SIGNATURE-----\n", b"SIGNATURE-----\nComment: from a front-end\n", 1), None),
    ],
    ids=["empty", "cut", "junk-behind", "junk-before", "NUL-behind", "half-behind", "CRLF", "comment"],
)  # fmt: skip
def test_a_damaged_open_pgp_signature(pgp: OpenPgpSite, change: Callable[[bytes], bytes], code: str | None) -> None:
    """Row 17. A signature file is armored signatures and nothing else; a comment in its head may be."""
    pgp.signature.write_bytes(change(pgp.signature.read_bytes()))
    if code is None:
        pgp.assert_accepted("alice")
    else:
        pgp.assert_refused(code)


def test_no_open_pgp_signature(pgp: OpenPgpSite) -> None:
    """Row 6. A file without one is refused, with the command that makes it."""
    pgp.signature.unlink()
    assert pgp.assert_refused("signature-missing") == "no signature: app.asc is not there"
    refusal = pgp.site.look(*pgp.flags).refusal
    assert refusal is not None
    assert refusal.remedy == "gpg --detach-sign --armor app"


@pytest.mark.parametrize("how", ["--sign", "--clearsign", "--store"])
@pytest.mark.parametrize("head", ["its own", "that of a signature"])
def test_a_signed_message_in_place_of_a_signature(pgp: OpenPgpSite, how: str, head: str) -> None:
    """A message that holds its own data says nothing about the file, whatever it calls itself."""
    content = pgp.keys.sign(pgp.site.content, "alice", options=(how,))
    if head != "its own":
        content = content.replace(b"PGP MESSAGE", b"PGP SIGNATURE")
    pgp.signature.write_bytes(content)
    is_passed_on = head != "its own" and how == "--sign"
    pgp.assert_refused("verifier-error" if is_passed_on else "signature-malformed")


def test_an_ssh_signature_under_the_name_of_another(pgp: OpenPgpSite, ssh: SshKeys) -> None:
    """Row 22. The scheme is what was configured, here as well."""
    pgp.signature.write_bytes(ssh.key("alice").sign(pgp.site.content))
    reason = pgp.assert_refused("signature-malformed")
    assert reason == "app.asc holds an SSH signature, not an OpenPGP signature"


@pytest.mark.parametrize(
    ("fault", "code"), [("armored", "trust-bad"), ("empty", "trust-empty"), ("missing", "trust-bad")]
)
def test_a_keyring_that_is_none(pgp: OpenPgpSite, fault: str, code: str) -> None:
    """Row 26. What the tool would take for a keyring without keys is said to be wrong."""
    write(pgp.site.keyring, pgp.keys.keyring("alice", armored=True) if fault == "armored" else b"")
    if fault == "missing":
        pgp.site.keyring.unlink()
    pgp.site.assert_off(code, *pgp.flags)


def test_no_tool_for_open_pgp(pgp: OpenPgpSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 23. Without gpgv nothing can be verified; and one that says yes to everything is found out."""
    monkeypatch.setattr(verifier, "DIRECTORIES", (pgp.site.directory,))
    pgp.site.assert_off("verifier-missing", *pgp.flags)
    double(pgp.site, monkeypatch, "gpgv", "exit 0")
    pgp.site.assert_off("verifier-unusable", *pgp.flags)


ALICE, BOB = "A" * 40, "B" * 40
SUBKEY = "C" * 40
NOW = 1_800_000_000


def _valid(key: str = ALICE, *, made: int = NOW, rest: str = "0 4 0 22 8 00", primary: str | None = None) -> str:
    return f"[GNUPG:] VALIDSIG {key} 2027-01-15 {made} {rest} {primary or key}"


NEW, GOOD = "[GNUPG:] NEWSIG", "[GNUPG:] GOODSIG AAAAAAAAAAAAAAAA alice"


@pytest.mark.parametrize(
    ("lines", "signers"),
    [
        ([NEW, GOOD, _valid()], [ALICE]),
        ([NEW, "[GNUPG:] KEY_CONSIDERED x 0", GOOD, "[GNUPG:] SIG_ID x", _valid()], [ALICE]),
        ([NEW, GOOD, _valid(SUBKEY, primary=ALICE)], [ALICE]),
        ([NEW, GOOD, _valid(made=NOW + 299)], [ALICE]),
        ([NEW, GOOD, _valid(rest="0 4 0 22 9 00")], [ALICE]),
        ([NEW, GOOD, _valid(rest="0 4 0 22 10 00")], [ALICE]),
        ([NEW, GOOD, _valid(), NEW, GOOD, _valid(BOB)], [ALICE, BOB]),
        ([NEW, GOOD, _valid(), NEW, GOOD, _valid()], [ALICE, ALICE]),
    ],
)
def test_status_lines_that_speak_for_a_file(lines: list[str], signers: list[str]) -> None:
    """Whose signatures are good is read from gpgv's status lines alone."""
    found = judge("".join(f"{line}\n" for line in lines).encode(), [ALICE, BOB], NOW)
    assert [signer.key for signer in found] == signers


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([], "verifier-error"),
        ([NEW], "verifier-error"),
        ([NEW, GOOD], "verifier-error"),
        ([NEW, _valid()], "verifier-error"),
        ([GOOD, _valid()], "verifier-error"),
        ([NEW, NEW, GOOD, _valid()], "verifier-error"),
        ([NEW, GOOD, _valid(), _valid()], "verifier-error"),
        ([NEW, GOOD, _valid(), "words"], "verifier-error"),
        (["x[GNUPG:] NEWSIG", GOOD, _valid()], "verifier-error"),
        ([NEW, GOOD, _valid(), "[GNUPG:]"], "verifier-error"),
        ([NEW, GOOD, _valid(), "[GNUPG:] FAILURE gpgv 1"], "verifier-error"),
        ([NEW, GOOD, _valid(), "[GNUPG:] ERROR proc_pkt.plaintext 89"], "verifier-error"),
        ([NEW, "[GNUPG:] BADSIG A alice"], "signature-mismatch"),
        ([NEW, GOOD, _valid(), NEW, "[GNUPG:] BADSIG B bob"], "signature-mismatch"),
        ([NEW, "[GNUPG:] ERRSIG A 22 8 00 1 9 A", "[GNUPG:] NO_PUBKEY A"], "untrusted-key"),
        ([NEW, GOOD, _valid(), NEW, "[GNUPG:] ERRSIG B 22 8 00 1 9 B", "[GNUPG:] NO_PUBKEY B"], "untrusted-key"),
        ([NEW, "[GNUPG:] KEYEXPIRED 1", "[GNUPG:] EXPKEYSIG A alice", _valid()], "key-expired"),
        ([NEW, GOOD, _valid(), NEW, "[GNUPG:] EXPKEYSIG B bob", _valid(BOB)], "key-expired"),
        ([NEW, "[GNUPG:] REVKEYSIG A alice", _valid()], "key-revoked"),
        ([NEW, "[GNUPG:] KEYREVOKED", GOOD, _valid()], "key-revoked"),
        ([NEW, "[GNUPG:] EXPSIG A alice", _valid()], "signature-expired"),
        ([NEW, "[GNUPG:] SIGEXPIRED", GOOD, _valid()], "signature-expired"),
        (["[GNUPG:] NODATA 1"], "signature-malformed"),
        ([NEW, GOOD, _valid(), "[GNUPG:] NODATA 4"], "signature-malformed"),
        ([NEW, GOOD, _valid(), "[GNUPG:] UNEXPECTED 0"], "signature-malformed"),
        ([NEW, GOOD, _valid(), "[GNUPG:] BADARMOR"], "signature-malformed"),
        ([NEW, GOOD, _valid(made=NOW + 301)], "key-not-yet-valid"),
        ([NEW, GOOD, _valid(made=NOW + 86400)], "key-not-yet-valid"),
        ([NEW, GOOD, _valid("D" * 40)], "untrusted-key"),
        ([NEW, GOOD, _valid(ALICE, primary="D" * 40)], "untrusted-key"),
        ([NEW, GOOD, _valid(), NEW, GOOD, _valid("D" * 40)], "untrusted-key"),
        ([NEW, GOOD, _valid(rest="0 4 0 22 2 00")], "signature-malformed"),
        ([NEW, GOOD, _valid(rest="0 4 0 22 8 01")], "signature-malformed"),
        ([NEW, GOOD, _valid(rest="0 4 0 22 8 00 x")], "signature-malformed"),
        ([NEW, GOOD, _valid(ALICE.lower())], "signature-malformed"),
        ([NEW, GOOD, _valid(ALICE[-16:])], "signature-malformed"),
        ([NEW, GOOD, _valid()[:60]], "signature-malformed"),
    ],
)
def test_status_lines_that_speak_against_a_file(lines: list[str], code: str) -> None:
    """Any line against any signature refuses the file, whatever else is said; so does all that is not understood."""
    with pytest.raises(CandidateError) as caught:
        judge("".join(f"{line}\n" for line in lines).encode(), [ALICE, BOB], NOW)
    assert caught.value.code == code


def test_no_signers_are_nobody() -> None:
    """An empty list lets nobody sign."""
    with pytest.raises(CandidateError) as caught:
        judge(f"{NEW}\n{GOOD}\n{_valid()}\n".encode(), [], NOW)
    assert caught.value.code == "untrusted-key"
