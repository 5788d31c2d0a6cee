"""What was found out about files is not found out twice, and is never more than a cache."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from programs import shell

from selfupdate.findings import Findings, Identity
from selfupdate.releases import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from service import Service

DIGEST = "0" * 64
IDENTITY = Identity(1, 2, 3, 4, 5)


def test_what_was_noted_is_there_after_a_restart(tmp_path: Path) -> None:
    """The digest for the file as it was, and for no other; the version for the digest."""
    path, file = tmp_path / "findings", tmp_path / "\udcff odd \N{SNOWMAN}"
    findings = Findings(path)
    findings.note_digest(file, IDENTITY, DIGEST)
    findings.note_version(DIGEST, "1.2.3")
    findings.save()
    assert path.stat().st_mode & 0o077 == 0
    again = Findings(path)
    assert again.digest_of(file, IDENTITY) == DIGEST
    assert again.digest_of(file, Identity(1, 2, 3, 4, 6)) is None
    assert again.version_of(DIGEST) == "1.2.3"
    again.forget_all_but([])
    again.save()
    assert Findings(path).version_of(DIGEST) is None
    assert [file.name for file in tmp_path.iterdir()] == ["findings"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"digests": [[1]], "versions": {}}',
        '{"digests": [["/x", [1, 2], "0"]], "versions": {}}',
        '{"digests": [["/x", [1, 2, 3, 4, 5], "../../etc"]], "versions": {"../x": "1.0.0"}}',
        "[" * 100000,
    ],
)
def test_anything_else_is_nothing(tmp_path: Path, text: str) -> None:
    """A damaged file costs time, and nothing else."""
    path = tmp_path / "findings"
    path.write_text(text, encoding="ascii")
    findings = Findings(path)
    assert findings.version_of("../x") is None
    assert findings.digest_of(path, IDENTITY) is None
    findings.note_version(DIGEST, "1.2.3")
    findings.save()
    assert json.loads(path.read_text(encoding="ascii"))["versions"] == {DIGEST: "1.2.3"}


def test_a_copy_that_has_gone_is_made_again(tmp_path: Path) -> None:
    """What is remembered is not taken for what is there."""
    candidate = shell(tmp_path / "candidate", "1.0.0", "exit")
    stores = []
    for _ in range(2):
        stores.append(Store(tmp_path / "state", 1 << 20))
        (tmp_path / "state").mkdir(exist_ok=True)
        stores[-1].open()
    first = stores[0].stage(candidate)
    stores[0].findings.save()
    first.path.unlink()
    second = stores[1].stage(candidate)
    assert second == first
    assert second.path.read_bytes() == candidate.read_bytes()


@pytest.mark.slow
def test_no_candidate_is_asked_again_after_a_restart_or_an_upgrade(start: Callable[..., Service]) -> None:
    """Each writes down that it was asked."""
    service = start("-probation", "100ms", "-drain", "1s")
    asked = service.upgrade_dir / "..asked"
    for number in range(3):
        shell(
            service.upgrade_dir / f"old-{number}",
            f"0.{number}.0",
            "exit 3",
        )
        path = service.upgrade_dir / f"old-{number}"
        text = path.read_text(encoding="ascii").replace("then echo", f"then echo {number} >> {asked}; echo")
        path.write_text(text, encoding="ascii")
    listing = service.get("/candidates")
    assert [candidate["version"] for candidate in listing["candidates"]] == ["0.2.0", "0.1.0", "0.0.0"]
    assert sorted(asked.read_text(encoding="ascii").split()) == ["0", "1", "2"]
    service.stop()
    service.restart()
    assert service.get("/candidates") == listing
    assert len(asked.read_text(encoding="ascii").split()) == len(listing["candidates"])
