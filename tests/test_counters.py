"""What is counted outlives the process that counts, and never falls."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from selfupdate.counters import LANES, LONGEST_KEY, SLOTS, Counters

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SLOT = 8 + LONGEST_KEY
SIZE = SLOTS * SLOT


def test_a_lane_is_the_only_file_and_this_accounts(tmp_path: Path) -> None:
    """It has one size, which it keeps, and nobody else can read it."""
    counters = Counters(tmp_path)
    counters.add(("a", 1.0))
    (path,) = tmp_path.iterdir()
    assert (path.name, path.stat().st_mode & 0o777, path.stat().st_size) == ("metrics.0", 0o600, SIZE)
    assert path.stat().st_blocks * 512 >= SIZE, "no page of it has to find room on the disk later"
    assert counters.totals() == {"a": 1.0}


def test_threads_count_at_the_same_time(tmp_path: Path) -> None:
    """No increment is lost, of keys that are there and of keys that come to be there."""
    counters = Counters(tmp_path)
    keys = [f"key {number}" for number in range(1000)]
    barrier = threading.Barrier(8)

    def count() -> None:
        barrier.wait()
        for key in keys:
            counters.add(("all", 1.0), (key, 0.5))
            counters.add(("all", 1.0), (key, 0.5))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=count) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    totals = counters.totals()
    assert totals.pop("all") == 16_000
    assert totals == dict.fromkeys(keys, 8.0)


def test_processes_count_beside_each_other_and_each_sees_all(tmp_path: Path) -> None:
    """Each has a lane; one that is left is the next one's, with what is in it."""
    first, second = Counters(tmp_path), Counters(tmp_path)
    first.add(("a", 1.0), ("b", 1.0))
    second.add(("a", 2.0))
    assert first.totals() == second.totals() == {"a": 3.0, "b": 1.0}
    del first
    third = Counters(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.0", "metrics.1"]
    third.add(("a", 4.0))
    assert third.totals() == second.totals() == {"a": 7.0, "b": 1.0}


_COUNTS = """
import sys
from pathlib import Path
from selfupdate.counters import Counters
counters = Counters(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    counters.add(("number", 1.0), (f"key {number % 1000}", 1.0))
    if number % 10 == 0:
        print(number, flush=True)
"""


def test_a_process_that_is_killed_leaves_what_it_had_counted(tmp_path: Path) -> None:
    """Again and again, wherever it is just then: nothing that it told of is missing, and no lane is damaged."""
    moments = random.Random(1)
    told = 0
    watching = Counters(tmp_path)
    for killed in range(1, 11):
        with subprocess.Popen([sys.executable, "-c", _COUNTS, tmp_path], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            before = watching.totals()
            for _ in range(moments.randrange(2, 40)):
                last = int(process.stdout.readline())
                now = watching.totals()
                assert all(now.get(key, 0.0) >= number for key, number in before.items())
                before = now
            process.kill()
        told += last
        after = watching.totals()
        number = after.pop("number")
        assert number >= told
        assert number - killed <= sum(after.values()) <= number
        told = int(number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.0", "metrics.1"]


def test_keys_of_another_version_stay(tmp_path: Path) -> None:
    """They are shown with all others, for whoever knows them."""
    other = Counters(tmp_path)
    other.add(("of a later version", 3.0))
    del other
    own = Counters(tmp_path)
    own.add(("own", 1.0))
    del own
    assert Counters(tmp_path).totals() == {"of a later version": 3.0, "own": 1.0}


def test_one_process_more_than_there_are_lanes_counts_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, and shows what the others count, too."""
    others = [Counters(tmp_path) for _ in range(LANES)]
    for counters in others:
        counters.add(("a", 1.0))
    assert not caplog.records
    late = Counters(tmp_path)
    late.add(("a", 1.0))
    assert [record.getMessage() for record in caplog.records] == ["what this process counts is lost when it ends"]
    assert late.totals() == {"a": LANES + 1.0}
    assert others[0].totals() == {"a": float(LANES)}


def test_without_a_directory_it_is_counted_in_memory() -> None:
    """The state directory cannot be used, so nobody takes over."""
    counters = Counters(None)
    counters.add(("a", 1.0))
    assert counters.totals() == {"a": 1.0}


def test_the_keys_have_a_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What finds no room is not counted, which the log says once; all else is."""
    counters = Counters(tmp_path)
    for number in range(SLOTS + 10):
        counters.add((f"key {number}", 1.0), ("key 0", 1.0))
    counters.add(("x" * (LONGEST_KEY + 1), 1.0))
    assert [record.getMessage() for record in caplog.records] == ["there are more counters than can be kept"]
    totals = counters.totals()
    assert len(totals) == SLOTS - 1
    assert totals["key 0"] == SLOTS + 11
    assert (tmp_path / "metrics.0").stat().st_size == SIZE


def _patched(at: int, content: bytes) -> Callable[[bytes], bytes]:
    return lambda before: before[:at] + content + before[at + len(content) :]


NOT_A_NUMBER, NEGATIVE = struct.pack("=d", float("nan")), struct.pack("=d", -1.0)


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda _: b"garbage", {}),
        (lambda before: bytes(len(before)), {}),
        (lambda before: random.Random(1).randbytes(len(before)), {}),
        (_patched(8, b"another layout"), {}),
        (_patched(0, NOT_A_NUMBER), {}),
        (_patched(0, struct.pack("=d", SLOTS)), {}),
        (_patched(0, struct.pack("=d", 1.5)), {}),
        (lambda before: before[: SLOT + 4], {}),
        (lambda before: before[: 2 * SLOT], {"a": 1.0}),
        (_patched(2 * SLOT, NOT_A_NUMBER), {"a": 1.0}),
        (_patched(2 * SLOT, NEGATIVE), {"a": 1.0}),
        (_patched(2 * SLOT + 8, b"\xff"), {"a": 1.0}),
        (_patched(2 * SLOT + 8, b"\0"), {"a": 1.0}),
        (_patched(2 * SLOT + 8, b"b\n"), {"a": 1.0}),
    ],
    ids=[
        "garbage",
        "zeros",
        "noise",
        "other-layout",
        "used-nan",
        "used-too-many",
        "used-a-part",
        "cut-in-a-slot",
        "cut",
        "number-nan",
        "number-negative",
        "key-no-text",
        "key-empty",
        "key-not-printable",
    ],
)
def test_what_is_damaged_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes], left: dict[str, float]
) -> None:
    """A word in the log, once; the rest is as it was, for who counts there next and for who only looks."""
    first, second = Counters(tmp_path), Counters(tmp_path)
    first.add(("a", 1.0), ("b", 2.0))
    second.add(("c", 4.0))
    del first
    path = tmp_path / "metrics.0"
    path.write_bytes(damage(path.read_bytes()))
    if path.stat().st_size == SIZE:
        assert second.totals() == {**left, "c": 4.0}
    third = Counters(tmp_path)
    assert [record.getMessage() for record in caplog.records] == ["counters are damaged, and begin anew"]
    assert counted(third) == counted(second) == {**left, "c": 4.0}
    third.add(("b", 1.0))
    assert counted(third) == {**left, "b": 1.0, "c": 4.0}
    assert path.stat().st_size == SIZE
    del third
    caplog.clear()
    assert counted(Counters(tmp_path)) == {**left, "b": 1.0, "c": 4.0}
    assert not caplog.records


def counted(counters: Counters) -> dict[str, float]:
    return {key: number for key, number in counters.totals().items() if number}


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
def test_what_is_no_file_is_left_alone(tmp_path: Path, kind: str) -> None:
    """The next lane is taken; nothing is written through a link."""
    path, target = tmp_path / "metrics.0", tmp_path / "target"
    target.write_bytes(b"")
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    counters = Counters(tmp_path)
    counters.add(("a", 1.0))
    assert (tmp_path / "metrics.1").stat().st_size == SIZE
    del counters
    assert Counters(tmp_path).totals() == {"a": 1.0}
    assert target.read_bytes() == b""


_FULL = """
import resource, signal, sys
from pathlib import Path
from selfupdate.counters import Counters
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
counters = Counters(Path(sys.argv[1]))
counters.add(("a", 1.0))
print(counters.totals())
"""


def test_a_disk_without_room_for_a_lane(tmp_path: Path) -> None:
    """It is counted in memory, and no part of a lane is left to take the room of something else."""
    ran = subprocess.run([sys.executable, "-c", _FULL, tmp_path], capture_output=True, text=True, check=True)
    assert ran.stdout == "{'a': 1.0}\n"
    assert ran.stderr == "what this process counts is lost when it ends\n"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0
