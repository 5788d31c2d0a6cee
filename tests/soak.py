"""Many upgrades in a row on one state directory, and what they cost: `make soak` prints it as a table.

What is to be flat: descriptors, threads and memory of the process that serves, files in the state
directory, the size of the journal, and the time of a scan.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from programs import Programs
from service import Service, resident, resources

HEAD = ("upgrades", "descriptors", "threads", "resident KiB", "files", "journal KiB", "scan ms", "upgrade ms")


def measure(service: Service, number: int, upgrades: list[float]) -> tuple[int, ...]:
    """Return a row of the table."""
    pid = service.get("/status")["pid"]
    used = resources(pid)
    scans = []
    for _ in range(5):
        began = time.monotonic()
        service.get("/candidates")
        scans.append(time.monotonic() - began)
    files = sum(path.is_file() for path in service.state_dir.rglob("*"))
    journal = (service.state_dir / "journal").stat().st_size // 1024
    times = [round(statistics.median(values) * 1000) for values in (scans, upgrades)]
    return (number, used["fd"], used["task"], resident(pid), files, journal, *times)


def main() -> None:
    """Upgrade as often as the command line asks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upgrades", type=int, nargs="?", default=200)
    count = parser.parse_args().upgrades
    print(*(f"{name:>12}" for name in HEAD))
    with tempfile.TemporaryDirectory() as directory:
        programs = Programs(Path(directory))
        place = Path(directory) / "service"
        place.mkdir()
        with Service(programs.version("1.0.0"), place, "-probation", "50ms", "-drain", "1s") as service:
            times: list[float] = []
            for number in range(1, count + 1):
                program = programs.version(f"1.0.{number}")
                program.replace(service.upgrade_dir / "next")
                began = time.monotonic()
                record = service.upgrade()
                times.append(time.monotonic() - began)
                assert record["outcome"] == "committed", record
                status = service.status_when(lambda status: status["phase"] == "RUNNING")
                service.wait_until_alone(status["pid"])
                if number == 1 or number % max(1, count // 8) == 0:
                    print(*(f"{value:>12}" for value in measure(service, number, times)), flush=True)
                    times.clear()


if __name__ == "__main__":
    main()
