"""Threats that signatures answer: each is tried with real keys, and what must not run leaves no trace.

The rows are those of the list of attacks that the project must withstand. Every
candidate is a script that makes a file, the marker, when it is executed at all,
be it for its version; so where the marker is absent, nothing has run.
"""

from __future__ import annotations

import base64
import functools
import os
import shutil
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
from keys import FOR_US, NAMESPACE, OpenPgpKeys, SshKey, SshKeys
from programs import Programs, fake, write_program
from service import PATIENCE, Service

from selfupdate import posix, settings, verifier
from selfupdate.errors import CandidateError, NotEligibleError, StopRequestedError, TrustError
from selfupdate.releases import Store
from selfupdate.trust import Trust

if TYPE_CHECKING:
    import io
    from collections.abc import Callable
    from pathlib import Path

from signed import Site, double, need_root, run, write

YEAR = 365 * 24 * 60 * 60
FLAGS = ("-probation", "100ms", "-drain", "2s")


# ---- rows 1 to 4: what is configured ----


def test_no_trust_root(bare: Site) -> None:
    """Row 1. Where nothing says whom to trust, upgrades are off, the text says how to turn them on, nothing runs."""
    with pytest.raises(TrustError, match="nothing says whose signatures count") as caught:
        bare.scanner(trust=Trust(settings.parse([], {"HOME": "/"}), bare.store, bare.stop_fd)).scan()
    assert caught.value.code == "no-trust-root"
    assert "-allowed-signers FILE" in str(caught.value.remedy)
    assert not bare.marker.exists()


@pytest.mark.slow
def test_a_service_without_a_trust_root(bare: Site, start: Callable[..., Service]) -> None:
    """Row 1. The service serves, each request for an upgrade is told why there is none, nothing runs."""
    service = start("-dev", "false")
    assert service.get("/healthz")["status"] == "ok"
    for answer in (service.ask("POST", "/upgrade"), service.ask("GET", "/candidates")):
        assert (answer.status, answer.json["code"]) == (503, "no-trust-root")
    trust = service.get("/status")["trust"]
    assert (trust["code"], trust["checked"], trust["scheme"]) == ("no-trust-root", True, None)
    service.line(message="upgrades are off", code="no-trust-root")
    assert not bare.marker.exists()


@pytest.mark.slow
def test_unsigned_on_purpose(bare: Site, start: Callable[..., Service], programs: Programs) -> None:
    """Row 2. It works, and the status says for good that nothing is checked, after an upgrade, too."""
    service = start("-insecure-allow-unsigned", "true", *FLAGS)
    (candidate,) = service.get("/candidates")["candidates"]
    assert (candidate["eligible"], candidate["signer"]) == (True, None)
    assert bare.marker.exists()
    (service.upgrade_dir / "new").symlink_to(programs.version("3.0.0"))
    assert service.upgrade()["outcome"] == "committed"
    status = service.status_when(lambda status: (status["phase"], status["version"]) == ("RUNNING", "3.0.0"))
    assert (status["trust"]["checked"], status["trust"]["code"]) == (False, None)


@pytest.mark.slow
def test_unsigned_on_purpose_is_logged_each_time(start: Callable[..., Service]) -> None:
    """Row 2. The start and each upgrade say in the log that signatures are not checked."""
    service = start("-insecure-allow-unsigned", "true")
    unchecked = "signatures are not checked: whoever can write to the upgrade directory decides what runs"
    service.line(message=unchecked, level="warning")
    assert service.ask("POST", "/upgrade").status == 200
    service.stop()
    assert [line["message"] for line in service.lines].count(unchecked) >= 2


@pytest.mark.parametrize("bind", ["0.0.0.0:0", ":0", "[::]:0"])
def test_unsigned_where_others_can_reach_it(programs: Programs, tmp_path: Path, bind: str) -> None:
    """Row 3. Without signatures the service does not start on an address of the network, token or not."""
    (tmp_path / "token").write_text("x" * 32, encoding="ascii")
    (tmp_path / "token").chmod(0o600)
    ran = run(programs, "-insecure-allow-unsigned", "true", "-bind", bind, "-token-file", str(tmp_path / "token"))
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"self-update: -insecure-allow-unsigned was given, and {bind} can be reached from ")


def test_unsigned_on_a_socket_that_others_can_reach(programs: Programs, tmp_path: Path) -> None:
    """Row 3. The same for a listening socket that was passed on, whatever `-bind` says."""
    (tmp_path / "token").write_text("x" * 32, encoding="ascii")
    (tmp_path / "token").chmod(0o600)
    flags = ("-insecure-allow-unsigned", "-token-file", str(tmp_path / "token"), "-state-dir", str(tmp_path / "state"))
    out, into = os.pipe()
    with socket.socket() as listener, open(out, encoding="utf-8") as said:  # noqa: PTH123 - a descriptor, not a path
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        command = [str(programs.version("1.0.0")), *flags]
        child = posix.spawn(command, os.environ, [listener.fileno()], listeners=1, streams={2: into})
        os.close(into)
        try:
            first = said.readline()
        finally:
            status = child.end(0 if '"serving"' in first else PATIENCE)
    assert first.startswith("self-update: "), first
    assert status in {1, 2}


def test_the_environment_does_not_turn_checking_off(bare: Site, programs: Programs) -> None:
    """Row 4. An empty variable is an error, and one that would allow unsigned files has no effect."""
    ran = run(programs, environ={"SELF_UPDATE_ALLOWED_SIGNERS": ""})
    assert (ran.returncode, ran.stderr) == (2, "self-update: SELF_UPDATE_ALLOWED_SIGNERS got ''; it takes a file\n")
    ran = run(
        programs,
        "-verify",
        str(bare.candidate),
        environ={"SELF_UPDATE_INSECURE_ALLOW_UNSIGNED": "true", "SELF_UPDATE_DEV": "true"},
    )
    assert (ran.returncode, "nothing says whose signatures count" in ran.stdout) == (1, True)
    assert not bare.marker.exists()


# ---- rows 5 to 17: one signature ----


def test_a_good_signature(site: Site, ssh: SshKeys) -> None:
    """Row 5. It is asked for its version, which is shown with its signer's name."""
    site.assert_accepted()
    chosen = site.scanner().choose()
    assert chosen is not None
    assert chosen.release is not None
    (signer,) = chosen.release.signers
    assert (signer.name, signer.key) == ("alice", ssh.key("alice").fingerprint)


def test_each_kind_of_key(site: Site, ssh: SshKeys) -> None:
    """Row 5. What the strict reading of the list takes, the tool takes, too: both must agree on each line."""
    keys = [ssh.key("rsa", "rsa", 3072), ssh.key("ecdsa", "ecdsa", 256), ssh.key("alice")]
    options = f'valid-after="20200101Z",{FOR_US},valid-before="20991231235959Z"'
    site.allow("# who may sign\r\n", "\n", *(key.line(options) for key in keys))
    for key in keys:
        site.signature.write_bytes(key.sign(site.content))
        site.assert_accepted(signer=key.name)


def test_no_signature(site: Site) -> None:
    """Row 6. A file without one is refused, with the command that makes it."""
    site.signature.unlink()
    assert site.assert_refused("signature-missing") == "no signature: app.sig is not there"
    refusal = site.look().refusal
    assert refusal is not None
    assert refusal.remedy == "ssh-keygen -Y sign -f KEY -n release@self-update app"


def test_a_changed_file(site: Site) -> None:
    """Row 7. One bit of the file is enough."""
    content = bytearray(site.content)
    content[-2] ^= 1
    write_program(site.candidate, bytes(content))
    site.assert_refused("signature-mismatch")


def test_the_signature_of_another_file(site: Site, ssh: SshKeys) -> None:
    """Row 8. A good signature is good for its own file alone."""
    site.signature.write_bytes(ssh.key("alice").sign(site.program("1.9.0")))
    site.assert_refused("signature-mismatch")


def test_an_unknown_key(site: Site, ssh: SshKeys) -> None:
    """Row 9. The fingerprint says whose it is not."""
    site.signature.write_bytes(ssh.key("mallory").sign(site.content))
    assert ssh.key("mallory").fingerprint in site.assert_refused("untrusted-key")


@pytest.mark.parametrize("signer", [None, "mallory"])
def test_a_file_that_need_not_be_copied(site: Site, ssh: SshKeys, signer: str | None) -> None:
    """Rows 6 and 9. What its signature alone refuses costs no copy: a large one is no way to fill the disk."""
    site.signature.unlink()
    if signer:
        site.signature.write_bytes(ssh.key(signer).sign(site.content))
    site.assert_refused("untrusted-key" if signer else "signature-missing")
    assert list(site.state.glob("releases/*")) == []


@pytest.mark.parametrize("namespace", ["file", "git", "release@another-product", "release@self-update2"])
def test_another_product(site: Site, ssh: SshKeys, namespace: str) -> None:
    """Row 10. What alice signed for another purpose is no release, even of the same bytes."""
    site.signature.write_bytes(ssh.key("alice").sign(site.content, namespace))
    assert f"signed for {namespace}, not for {NAMESPACE}" in site.assert_refused("wrong-product")


@pytest.mark.parametrize("namespaces", ["git", "git,file", "release@another-product"])
def test_a_key_for_another_product(site: Site, ssh: SshKeys, namespaces: str) -> None:
    """Row 11. A key that may sign something else does not sign releases."""
    site.allow(ssh.key("alice").line(f'namespaces="{namespaces}"'))
    assert site.assert_refused("key-not-for-product") == f"alice may not sign for {NAMESPACE}"


def test_a_key_for_several_products(site: Site, ssh: SshKeys) -> None:
    """Row 11. One that may sign releases among other things does."""
    site.allow(ssh.key("alice").line(f'namespaces="git,{NAMESPACE}"'))
    site.assert_accepted()


def _day(seconds: float) -> str:
    return time.strftime("%Y%m%dZ", time.gmtime(time.time() + seconds))


def test_an_expired_key(site: Site, ssh: SshKeys) -> None:
    """Row 12. Behind `valid-before` no signature counts, whenever it was made; the reason names the time."""
    site.allow(ssh.key("alice").line(f'{FOR_US},valid-before="20200102Z"'))
    assert "is no longer valid, since 2020-01-02 00:00:00 UTC" in site.assert_refused("key-expired")


def test_a_key_that_expires_between_two_scans(site: Site, ssh: SshKeys) -> None:
    """Row 12. What was found good is not remembered longer than the key is valid."""
    end = int(time.time()) + 3
    site.allow(ssh.key("alice").line(time.strftime(f'{FOR_US},valid-before="%Y%m%d%H%M%SZ"', time.gmtime(end))))
    trust = site.trust()
    scanner = site.scanner(trust=trust)
    chosen = scanner.choose()
    assert chosen is not None
    assert chosen.release is not None
    trust.confirm(chosen.release)
    site.marker.unlink()
    threading.Event().wait(end + 0.1 - time.time())  # the clock is what the claim is about
    with pytest.raises(CandidateError, match="the key of alice is no longer valid"):
        trust.confirm(chosen.release)
    refusal = site.look(scanner=scanner).refusal
    assert refusal is not None
    assert (refusal.code, site.marker.exists()) == ("key-expired", False)


def test_a_key_that_is_not_valid_yet(site: Site, ssh: SshKeys) -> None:
    """Row 13. Before `valid-after`, neither."""
    site.allow(ssh.key("alice").line(f'{FOR_US},valid-after="20990102Z"'))
    assert "is not valid before 2099-01-02 00:00:00 UTC" in site.assert_refused("key-not-yet-valid")


@pytest.mark.parametrize("form", ["krl", "text"])
def test_a_revoked_key(site: Site, ssh: SshKeys, form: str) -> None:
    """Row 14. In a key revocation list or in a list of public keys; another key's revocation is none of hers."""
    for key, is_revoked in ((ssh.key("mallory"), False), (ssh.key("alice"), True)):
        content = ssh.krl(key) if form == "krl" else f"# revoked\n{key.public} comment\n".encode()
        write(site.revoked, content)
        if is_revoked:
            assert site.assert_refused("key-revoked", "-revoked-keys", str(site.revoked)).startswith("the key of alice")
        else:
            site.assert_accepted("-revoked-keys", str(site.revoked))


@pytest.mark.parametrize(
    "fault",
    [
        "missing",
        "empty",
        "comments",
        "garbage",
        "binary",
        "directory",
        "cut-head",
        "cut-section",
        "cut-end",
        "cut-text",
    ],
)
def test_a_revocation_list_that_cannot_be_read(site: Site, ssh: SshKeys, fault: str) -> None:
    """Row 15. Where it cannot be known what is revoked, nothing runs: above all where the tool would pass it over."""
    krl = ssh.krl(ssh.key("mallory"), ssh.key("alice"))
    if fault == "directory":
        site.revoked.mkdir(mode=0o700)
    elif fault != "missing":
        content = {
            "empty": b"",
            "comments": b"# nobody\n\n",
            "garbage": b"alice\n",
            "binary": bytes(range(256)),
            "cut-head": krl[:44],
            "cut-section": krl[:60],
            "cut-end": krl[:-1],
            "cut-text": ssh.key("mallory").public[:32].encode(),
        }[fault]
        write(site.revoked, content)
    code = "trust-permissions" if fault == "directory" else "revocation-unreadable"
    site.assert_off(code, "-revoked-keys", str(site.revoked))


def test_how_things_stand_is_told_while_the_service_stops(site: Site, ssh: SshKeys) -> None:
    """As it was known last, since no verifier runs any more; whoever looks by itself is not ended by that."""
    write(site.revoked, ssh.krl(ssh.key("mallory")))
    stop_out, stop_in = socket.socketpair()
    with stop_out, stop_in:
        site.stop_fd = stop_out.fileno()
        trust = site.trust("-revoked-keys", str(site.revoked))
        before = trust.as_json(None)
        assert (before["scheme"], before["code"]) == ("ssh", None)
        stop_in.send(b"\0")
        write(site.revoked, ssh.krl(ssh.key("mallory"), ssh.key("bob")))
        with pytest.raises(StopRequestedError):
            trust.read()
        assert trust.as_json(None) == before


@pytest.mark.parametrize("form", ["krl", "text", "removed"])
def test_a_key_that_is_revoked_after_the_scan(site: Site, ssh: SshKeys, form: str) -> None:
    """Row 16. A candidate that was listed as good is refused when the upgrade is asked for, and before it starts."""
    write(site.revoked, ssh.krl(ssh.key("mallory")))
    trust = site.trust("-revoked-keys", str(site.revoked))
    scanner = site.scanner(trust=trust)
    site.assert_accepted(scanner=scanner)
    chosen = scanner.choose("app")
    assert chosen is not None
    assert chosen.release is not None
    trust.confirm(chosen.release)
    if form == "removed":
        site.allow(ssh.key("bob").line())
    else:
        write(site.revoked, ssh.krl(ssh.key("alice")) if form == "krl" else ssh.key("alice").public.encode())
    why = "not trusted here" if form == "removed" else "the key of alice has been revoked"
    with pytest.raises(CandidateError, match=why):
        trust.confirm(chosen.release)
    with pytest.raises(NotEligibleError, match=why) as caught:
        scanner.choose("app")
    assert caught.value.code == ("untrusted-key" if form == "removed" else "key-revoked")
    assert scanner.choose() is None


def test_the_tool_is_told_of_revoked_keys_too(site: Site, ssh: SshKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 14. What is found out here is not all that stands between a revoked key and a release: the tool decides."""
    write(site.revoked, ssh.krl(ssh.key("mallory")))
    log = site.directory / "asked"
    double(site, monkeypatch, "ssh-keygen", f'echo "$*" >> {log}\nexec {shutil.which("ssh-keygen")} "$@"')
    site.assert_accepted("-revoked-keys", str(site.revoked))
    (asked,) = [line for line in log.read_text(encoding="utf-8").splitlines() if "-I alice" in line]
    assert asked == f"-Y verify -f allowed -I alice -n {NAMESPACE} -s signature -r revoked"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda _: b"", "signature-empty"),
        (lambda good: good[:150], "signature-malformed"),
        (lambda good: good[:-10], "signature-malformed"),
        (lambda _: bytes(range(256)), "signature-malformed"),
        (lambda good: good + b"junk\n", "signature-malformed"),
        (lambda good: b"junk\n" + good, "signature-malformed"),
        (lambda good: good + b"\0", "signature-malformed"),
        (lambda good: good.replace(b"-----BEGIN", b"----BEGIN"), "signature-malformed"),
        (lambda good: b"\xef\xbb\xbf" + good, "signature-malformed"),
        (lambda good: _bent(good, 0), "signature-malformed"),
        (lambda good: _bent(good, 9), "signature-malformed"),
        (lambda good: _bent(good, -1), "signature-mismatch"),
        (lambda good: good.replace(b"\n", b"\r\n"), None),
    ],
    ids=[
        "empty", "cut", "cut-end", "random", "junk-behind", "junk-before", "NUL-behind", "begin", "BOM",
        "magic", "version", "flipped", "CRLF",
    ],
)  # fmt: skip
def test_a_damaged_signature(site: Site, change: Callable[[bytes], bytes], code: str | None) -> None:
    """Row 17. A signature file is a signature, whole and alone; but for the line ends of another system."""
    site.signature.write_bytes(change(site.signature.read_bytes()))
    if code is None:
        site.assert_accepted()
    else:
        site.assert_refused(code)


def _bent(signature: bytes, place: int) -> bytes:
    """Return an armored SSH signature with a bit flipped in the byte at `place` of what is armored."""
    lines = signature.splitlines()
    blob = bytearray(base64.b64decode(b"".join(lines[1:-1])))
    blob[place] ^= 1
    return b"\n".join([lines[0], base64.b64encode(blob), lines[-1], b""])


# ---- rows 18 to 22: what stands where the signature should ----


def _hole(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _device(path: Path) -> None:
    need_root()
    os.mknod(path, 0o20644, os.makedev(1, 5))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: path.write_bytes(b"x" * (16 * 1024 + 1)), "signature-too-big"),
        (lambda path: _hole(path, 100 << 20), "signature-too-big"),
        (lambda path: _hole(path, 8 << 30), "signature-too-big"),
        (lambda path: path.symlink_to("/dev/zero"), "signature-not-regular"),
        (lambda path: path.symlink_to(".good"), "signature-not-regular"),
        (lambda path: path.symlink_to(path.name), "signature-not-regular"),
        (os.mkfifo, "signature-not-regular"),
        (os.mkdir, "signature-not-regular"),
        (_device, "signature-not-regular"),
    ],
    ids=["16K+1", "100M", "8G", "zero", "link", "loop", "FIFO", "directory", "device"],
)
def test_no_file_of_a_signature(
    site: Site, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], code: str
) -> None:
    """Row 18. Whatever would be endless, huge or elsewhere is refused at once, and no tool is started for it."""
    scanner = site.scanner()
    site.assert_accepted(scanner=scanner)  # the tool has been tested
    site.signature.rename(site.upgrades / ".good")
    (site.upgrades / ".good").chmod(0o644)
    make(site.signature)
    started = double(site, monkeypatch, "ssh-keygen", "exit 0")
    begin, begin_of_work = time.monotonic(), time.thread_time()
    site.assert_refused(code, scanner=scanner)
    assert time.thread_time() - begin_of_work < 0.05
    assert time.monotonic() - begin < 1, "it waited for something"
    assert not started.exists()


@pytest.mark.parametrize(
    ("signed", "code"),
    [
        ("alice", "not-enough-signers"),
        ("alice + alice", "not-enough-signers"),
        ("alice + mallory", "not-enough-signers"),
        ("alice + alice2", "not-enough-signers"),
        ("alice + bob, another file", "not-enough-signers"),
        ("alice + bob, revoked", "not-enough-signers"),
        ("alice + bob", None),
        ("mallory + alice + alice + bob", None),
    ],
)
def test_two_signers_are_needed(site: Site, ssh: SshKeys, signed: str, code: str | None) -> None:
    """Row 19. Two people must have signed, each with a key of their own that counts; the reason says who did."""
    site.allow(*(ssh.key(name).line(name=name.rstrip("2")) for name in ("alice", "alice2", "bob")))
    write(site.revoked, ssh.krl(ssh.key("bob" if "revoked" in signed else "nobody")))
    parts = [part.partition(", ") for part in signed.split(" + ")]
    contents = [site.content + (b"#" if how == "another file" else b"") for _, _, how in parts]
    site.signature.write_bytes(
        b"".join(ssh.key(name).sign(content) for (name, _, _), content in zip(parts, contents, strict=True))
    )
    flags = ("-signers-required", "2", "-revoked-keys", str(site.revoked))
    if code is None:
        site.assert_accepted(*flags, signer="alice, bob")
    else:
        assert site.assert_refused(code, *flags).startswith("2 signers needed, 1 valid (alice)")


def test_more_signers_are_needed_than_are_listed(site: Site, ssh: SshKeys) -> None:
    """Row 19. A list by which nothing could ever run is said to be wrong, and two keys of one person are one."""
    site.allow(ssh.key("alice").line(), ssh.key("alice2").line(name="alice"))
    site.assert_off("trust-bad", "-signers-required", "2")


def test_many_signatures(site: Site) -> None:
    """Row 20. Eight are read, nine are not."""
    one = site.signature.read_bytes()
    site.signature.write_bytes(one * 8)
    site.assert_accepted()
    site.signature.write_bytes(one * 9)
    site.assert_refused("signature-malformed")


@pytest.mark.parametrize("bad", ["unknown", "mismatch", "wrong-product"])
def test_a_bad_signature_before_a_good_one(site: Site, ssh: SshKeys, bad: str) -> None:
    """Row 21. A stranger's signature is no veto, wherever it stands."""
    good = site.signature.read_bytes()
    other = {
        "unknown": lambda: ssh.key("mallory").sign(site.content),
        "mismatch": lambda: ssh.key("alice").sign(b"another file"),
        "wrong-product": lambda: ssh.key("alice").sign(site.content, "git"),
    }[bad]()
    for content in (other + good, good + other):
        site.signature.write_bytes(content)
        site.assert_accepted()


@pytest.mark.parametrize("kind", ["armored", "binary"])
def test_an_open_pgp_signature_under_the_name_of_another(site: Site, gpg: OpenPgpKeys, kind: str) -> None:
    """Row 22. The scheme is what was configured, never what the file seems to be; the reason says what it seems."""
    content = gpg.sign(site.content, "alice")
    site.signature.write_bytes(content if kind == "armored" else gpg.dearmored(content))
    reason = site.assert_refused("signature-malformed")
    assert reason == "app.sig holds an OpenPGP signature, not an SSH signature"


def test_a_minisign_signature(site: Site) -> None:
    """Row 22. The same for minisign's and signify's, which take the same suffix."""
    site.signature.write_text("untrusted comment: signature from a secret key\nRUQf6LRCGA9i53ml\n", encoding="ascii")
    reason = site.assert_refused("signature-malformed")
    assert reason == "app.sig holds a minisign or signify signature, not an SSH signature"


# ---- rows 23 to 25: the tool ----


def test_no_tool(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 23. Without ssh-keygen nothing can be verified, so nothing runs, also when it goes later."""
    scanner = site.scanner()
    site.assert_accepted(scanner=scanner)
    write_program(site.candidate, site.program("3.0.0"))
    monkeypatch.setattr(verifier, "DIRECTORIES", (site.directory,))
    assert "install openssh-client" in str(site.assert_off("verifier-missing").remedy)
    with pytest.raises(TrustError, match="ssh-keygen was not found"):
        scanner.scan()
    assert not site.marker.exists()


def test_a_tool_of_the_same_name_in_the_path(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 23. A program that says yes to everything is not found by the name that it took."""
    real = verifier.DIRECTORIES
    fake = double(site, monkeypatch, "ssh-keygen", "exit 0")
    monkeypatch.setattr(verifier, "DIRECTORIES", real)
    monkeypatch.setenv("PATH", f"{site.directory / 'doubles'}:{os.environ['PATH']}")
    subprocess.run(["ssh-keygen"], check=True)  # that is what a search would find
    fake.unlink()
    write_program(site.candidate, site.program("3.0.0"))
    site.assert_refused("signature-mismatch")
    assert not fake.exists()


def test_the_tool_sees_nothing_of_our_environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 73. Variables that could steer it do not reach it."""
    for name in ("OPENSSL_CONF", "LD_LIBRARY_PATH", "SSH_AUTH_SOCK", "HOME", "SELF_UPDATE_TEST"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    seen = site.directory / "seen"
    double(site, monkeypatch, "ssh-keygen", f'env > {seen}\nexec {shutil.which("ssh-keygen")} "$@"')
    site.assert_accepted()
    variables = dict(line.split("=", 1) for line in seen.read_text(encoding="utf-8").splitlines())
    for name in ("PWD", "OLDPWD", "SHLVL", "_"):  # the double's own shell sets them
        variables.pop(name, None)
    assert variables == {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


@pytest.mark.parametrize(
    "blind",
    [
        f'echo "Good \\"{NAMESPACE}\\" signature for alice"; exit 0',
        'sed -i "s/valid-before=[^,]*,//" allowed',
        'while read -r _; do :; done; printf self-update | exec "$real" "$@"',
        'for word; do shift; [ "$word" != other@self-update ] || word=self-test@self-update; set -- "$@" "$word"; done',
    ],
    ids=["everything", "times", "content", "namespace"],
)
def test_a_tool_that_says_yes_to_everything(site: Site, monkeypatch: pytest.MonkeyPatch, blind: str) -> None:
    """Row 23. Even in its own place it is found out, by questions whose answer is no; blind to one thing is enough."""
    double(site, monkeypatch, "ssh-keygen", f'real={shutil.which("ssh-keygen")}\n{blind}\nexec "$real" "$@"')
    site.assert_off("verifier-unusable")


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("exec sleep 1000", "verifier-timeout"),
        ("kill -KILL $$", "verifier-crashed"),
        ("exit 3", "verifier-error"),
        ("exit 0", "verifier-error"),
        ("exec cat /dev/zero", "verifier-error"),
        ("sleep 1000 & exit 0", "verifier-error"),
        (f"echo 'Good \"{NAMESPACE}\" signature for bob with ED25519 key SHA256:x'", "verifier-error"),
        (f"printf 'x\nGood \"{NAMESPACE}\" signature for alice with ED25519 key SHA256:x\n'", "verifier-error"),
        (f"printf 'Good \"{NAMESPACE}\" signature for alice with ED25519\nx key KEY\n'", "verifier-error"),
        (f"printf 'Good \"{NAMESPACE}\" signature for alice with ED25519 key KEY'", "verifier-error"),
    ],
    ids=[
        *("hangs", "killed", "fails", "silent", "endless", "leaves-a-child"),
        *("another-signer", "a-line-before", "a-line-within", "no-line"),
    ],
)
def test_a_tool_that_breaks(site: Site, ssh: SshKeys, monkeypatch: pytest.MonkeyPatch, then: str, code: str) -> None:
    """Row 24. No answer is no verdict: refused, with what happened, nothing is left, and tried again with the next."""
    scanner = site.scanner(trust=site.trust(verify_time=1.0 if code == "verifier-timeout" else PATIENCE))
    site.signature.rename(site.upgrades / ".good")
    site.assert_refused("signature-missing", scanner=scanner)  # the tool has been tested
    (site.upgrades / ".good").rename(site.signature)
    real = verifier.DIRECTORIES
    then = then.replace("KEY", ssh.key("alice").fingerprint)
    started = double(site, monkeypatch, "ssh-keygen", then)
    assert site.assert_refused(code, scanner=scanner).startswith("the signature check did not finish: ssh-keygen: ")
    assert started.exists()
    monkeypatch.setattr(verifier, "DIRECTORIES", real)
    site.assert_accepted(scanner=scanner)


def test_a_tool_that_is_broken_from_the_start(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 24. Upgrades are off, with the same reason; the status can tell it, and the start goes through."""
    double(site, monkeypatch, "ssh-keygen", "kill -KILL $$")
    trust = site.trust()
    trust.announce()
    assert trust.as_json(None)["code"] == "verifier-crashed"
    site.assert_off("verifier-crashed")


def test_a_tool_that_breaks_at_the_revocation_list(site: Site, ssh: SshKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 24. Where the tool cannot say what is revoked, upgrades are off, and the status can tell why."""
    write(site.revoked, ssh.krl(ssh.key("mallory")))
    trust = site.trust("-revoked-keys", str(site.revoked))
    trust.read()
    write(site.revoked, ssh.krl(ssh.key("alice")))
    double(site, monkeypatch, "ssh-keygen", "kill -KILL $$")
    assert trust.as_json(None)["code"] in {"verifier-crashed", "revocation-unreadable"}
    with pytest.raises(TrustError):
        site.scanner(trust=trust).scan()
    assert not site.marker.exists()


def test_no_room_for_the_check(site: Site) -> None:
    """Row 24. Where the check has no place to work in, upgrades are off with a reason, and the start goes through."""
    site.state.rmdir()
    site.state.write_bytes(b"")
    trust = site.trust()
    trust.announce()
    assert trust.as_json(None)["code"] == "verifier-error"
    with pytest.raises(TrustError):
        site.scanner(trust=trust).scan()
    assert not site.marker.exists()


def test_a_stop_during_the_first_check(bare: Site, ssh: SshKeys) -> None:
    """Row 24. A stop signal ends the check of the tool, and is no defect of the service."""
    bare.allow(ssh.key("alice").line())
    stop_out, stop_in = socket.socketpair()
    with stop_out, stop_in:
        stop_in.send(b"\0")
        given = settings.parse(["-allowed-signers", str(bare.allowed)], {"HOME": "/"})
        Trust(given, bare.store, stop_out.fileno()).announce()


@pytest.mark.slow
def test_an_account_without_an_entry(site: Site, programs: Programs) -> None:
    """Row 25. ssh-keygen does not work for it, which is found out at the start and said; the service serves."""
    need_root()
    os.chown(site.state, 12345, 12345)
    site.upgrades.chmod(0o755)
    for path in (site.directory, *list(site.directory.parents)[:3]):
        path.chmod(path.stat().st_mode | 0o755)
    flags = ("-allowed-signers", str(site.allowed))
    with Service(programs.version("1.0.0"), site.directory, *flags, user=12345) as service:
        line = service.line(message="upgrades are off", code="verifier-unusable")
        assert "No user exists for uid 12345" in line["reason"]
        assert "/etc/passwd" in line["remedy"]
        answer = service.ask("GET", "/candidates")
        assert (answer.status, answer.json["code"]) == (503, "verifier-unusable")
        assert service.get("/healthz")["status"] == "ok"
    assert not site.marker.exists()


# ---- rows 36 and 37: what arrives later ----


class Overtaking(Store):
    """A store that is ahead of a candidate's writer, whose `rest` arrives when what was there has been copied."""

    candidate: Path
    rest: bytes

    def _write(self, reader: io.RawIOBase, target: Path) -> str:
        sha256 = super()._write(reader, target)
        with self.candidate.open("ab") as writer:
            writer.write(self.rest)
        self.rest = b""
        return sha256


def test_a_file_that_is_still_being_copied(site: Site, ssh: SshKeys) -> None:
    """Row 36. It is refused while its writer is at work, and taken as soon as it is whole and signed."""
    site.store = store = Overtaking(site.state, settings.Limits().candidate_size)
    store.candidate, store.rest = site.candidate, b"#"
    scanner = site.scanner()
    assert "is still being copied" in site.assert_refused("candidate-changing", scanner=scanner)
    site.assert_refused("signature-mismatch", scanner=scanner)
    site.signature.write_bytes(ssh.key("alice").sign(site.content))
    site.assert_accepted(scanner=scanner)


def test_a_signature_that_arrives_later(site: Site) -> None:
    """Row 37. What had no signature, or half of one, is taken when it has it, by the same process."""
    scanner = site.scanner()
    good = site.signature.read_bytes()
    site.signature.unlink()
    site.assert_refused("signature-missing", scanner=scanner)
    site.signature.write_bytes(good[:100])
    site.assert_refused("signature-malformed", scanner=scanner)
    site.signature.write_bytes(good)
    site.assert_accepted(scanner=scanner)


def test_a_signature_that_goes(site: Site) -> None:
    """Row 37. And the other way round: what was good a moment ago needs its signature now."""
    scanner = site.scanner()
    site.assert_accepted(scanner=scanner)
    site.signature.unlink()
    refusal = site.look(scanner=scanner).refusal
    assert refusal is not None
    assert refusal.code == "signature-missing"


def test_a_refusal_that_is_remembered(site: Site, ssh: SshKeys) -> None:
    """Row 42. A file that is refused with every scan takes no more memory with each."""
    site.signature.write_bytes(ssh.key("alice").sign(b"another file"))
    scanner = site.scanner()
    depths = {_depth(site.look(scanner=scanner).refusal) for _ in range(5)}
    assert len(depths) <= 2, "each scan adds its frames to the error that is kept"


def _depth(error: BaseException | None) -> int:
    """Return how many frames an error holds."""
    traceback = error.__traceback__ if error else None
    depth = 0
    while traceback is not None:
        depth, traceback = depth + 1, traceback.tb_next
    return depth


# ---- rows 70 and 71: time, and the way back ----


@pytest.mark.slow
def test_a_clock_that_is_five_years_off(site: Site, ssh: SshKeys, start: Callable[..., Service]) -> None:
    """Row 70. What the keys' times then say is said, nothing runs, and the running service does not mind.

    To a clock that is five years back, a key of today is one of five years ahead, and the other way round.
    """
    ahead, behind = ssh.key("ahead"), ssh.key("behind")
    site.allow(
        ahead.line(f'{FOR_US},valid-after="{_day(4 * YEAR)}",valid-before="{_day(6 * YEAR)}"'),
        behind.line(f'{FOR_US},valid-after="{_day(-6 * YEAR)}",valid-before="{_day(-4 * YEAR)}"'),
    )
    for key in (ahead, behind):
        write_program(site.upgrades / key.name, site.program())
        (site.upgrades / f"{key.name}.sig").write_bytes(key.sign(site.program()))
    site.candidate.unlink()
    service = start("-allowed-signers", str(site.allowed))
    codes = {candidate["name"]: candidate["code"] for candidate in service.get("/candidates")["candidates"]}
    assert codes == {"ahead": "key-not-yet-valid", "behind": "key-expired"}
    assert service.upgrade()["outcome"] == "up-to-date"
    assert service.get("/healthz")["status"] == "ok"
    assert service.get("/status")["trust"]["code"] is None
    assert not site.marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "reason"),
    [("revoked", "the key of alice has been revoked"), ("expired", "the key of alice is no longer valid, since 2020")],
)
def test_the_way_back_when_the_signers_key_has_ended(
    site: Site, ssh: SshKeys, start: Callable[..., Service], programs: Programs, end: str, reason: str
) -> None:
    """Row 71. What was verified when it was committed is gone back to, by hand and by itself; the status says so."""
    alice, bob = ssh.key("alice"), ssh.key("bob")
    site.candidate.unlink()
    site.allow(alice.line(), bob.line())
    write(site.revoked, ssh.krl(ssh.key("mallory")))
    service = start("-allowed-signers", str(site.allowed), "-revoked-keys", str(site.revoked), *FLAGS)
    for version, signer in (("1.1.0", alice), ("1.2.0", bob)):
        _offer(service, programs.version(version), version, signer)
        assert service.upgrade()["outcome"] == "committed"
        service.status_when(functools.partial(_runs, version))
    if end == "revoked":
        write(site.revoked, ssh.krl(alice))
    else:
        site.allow(alice.line(f'{FOR_US},valid-before="20200101Z"'), bob.line())
    answer = service.ask("POST", "/rollback?wait=30s")
    assert service.record_when(answer.json["id"], lambda record: record["outcome"])["outcome"] == "committed"
    running = service.status_when(functools.partial(_runs, "1.1.0"))["trust"]["running"]
    assert (running["name"], running["reason"].startswith(reason)) == ("alice", True)
    _offer(service, fake(site.directory / "bad", "full", "1.3.0", "dies before it accepts"), "bad", bob)
    assert service.upgrade()["outcome"] == "rolled-back"
    assert _runs("1.1.0", service.get("/status"))
    refused = service.ask("POST", "/upgrade", {"name": "1.1.0"})
    assert (refused.status, refused.json["code"]) == (422, "key-revoked" if end == "revoked" else "key-expired")


@pytest.mark.slow
def test_the_way_back_to_what_was_never_verified(
    site: Site, ssh: SshKeys, start: Callable[..., Service], programs: Programs
) -> None:
    """Row 71. What was committed while nothing was checked does not come back when something is."""
    site.candidate.unlink()
    service = start(*FLAGS)
    for version in ("1.1.0", "1.2.0"):
        _offer(service, programs.version(version), version, ssh.key("alice"))
        assert service.upgrade()["outcome"] == "committed"
        service.status_when(functools.partial(_runs, version))
    service.stop()
    service.restart("-allowed-signers", str(site.allowed), *FLAGS)
    answer = service.ask("POST", "/rollback")
    assert answer.status == 409
    assert answer.json["detail"] == "There is no version to go back to: 1.1.0 was never verified."


def _offer(service: Service, program: Path, name: str, signer: SshKey) -> None:
    """Put a program where candidates are looked for: first its signature."""
    (service.upgrade_dir / f"{name}.sig").write_bytes(signer.sign(program.read_bytes()))
    (service.upgrade_dir / name).symlink_to(program)


def _runs(version: str, status: dict[str, object]) -> bool:
    return (status["phase"], status["version"]) == ("RUNNING", version)
