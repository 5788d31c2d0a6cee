"""The command -verify: what the service would think of a file, and nothing runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from programs import Programs, write_program

if TYPE_CHECKING:
    from collections.abc import Callable

    from keys import SshKeys

from signed import Site, run

YEAR = 365 * 24 * 60 * 60
FLAGS = ("-probation", "100ms", "-drain", "2s")


# ---- the command that asks, and does not run ----


def test_verify_says_who_signed_a_file(site: Site, ssh: SshKeys, programs: Programs) -> None:
    """It prints that the file would be run, by whom it is signed, and does not run it."""
    ran = run(programs, "-verify", str(site.candidate), "-allowed-signers", str(site.allowed))
    assert (ran.returncode, ran.stderr) == (0, "")
    first, second = ran.stdout.splitlines()
    assert re.fullmatch("app would be asked for its version, and run: sha256 [0-9a-f]{64}", first)
    assert second == f"signed by alice, {ssh.key('alice').fingerprint}"
    assert not site.marker.exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda site: site.signature.unlink(),
            (
                "app would not be run: no signature: app.sig is not there (signature-missing)\n"
                "to mend it: ssh-keygen -Y sign -f KEY -n release@self-update app\n"
            ),
        ),
        (
            lambda site: write_program(site.candidate, site.program("3.0.0")),
            (
                "app would not be run: is not the file that alice signed: it was altered, or copied badly "
                "(signature-mismatch)\nto mend it: copy it and its signature again\n"
            ),
        ),
        (
            lambda site: site.candidate.chmod(0o644),
            "app would not be run: is not executable (candidate-not-executable)\nto mend it: chmod +x app\n",
        ),
        (
            lambda site: site.candidate.unlink(),
            "app cannot be read: No such file or directory\nto mend it: name a file that is there\n",
        ),
        (
            lambda site: site.allow("# nobody\n"),
            "Upgrades are off: the allowed-signers file lists no key.\nto mend it: add a line for each signer\n",
        ),
    ],
    ids=["missing", "tampered", "not-executable", "no-file", "nobody"],
)
def test_verify_says_why_a_file_would_notrun(
    site: Site, programs: Programs, spoil: Callable[[Site], object], said: str
) -> None:
    """It prints the reason and the remedy, ends with status 1, and does not run it."""
    spoil(site)
    ran = run(programs, "-verify", str(site.candidate), "-allowed-signers", str(site.allowed))
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, said, "")
    assert not site.marker.exists()


def test_verify_says_that_nothing_was_verified(bare: Site, programs: Programs) -> None:
    """Where signatures are not checked, it says so."""
    ran = run(programs, "-verify", str(bare.candidate), "-insecure-allow-unsigned")
    assert ran.returncode == 0
    assert ran.stdout.endswith("\nits signature was not checked: -insecure-allow-unsigned\n")
    assert not bare.marker.exists()


def test_verify_takes_what_the_service_takes(site: Site, programs: Programs) -> None:
    """Flags with which the service would not start are wrong here, too: the answer is about that service."""
    flags = ("-allowed-signers", str(site.allowed), "-insecure-allow-unsigned")
    ran = run(programs, "-verify", str(site.candidate), *flags)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("self-update: -insecure-allow-unsigned was given with a list of signers")
