"""`make fuzz`: try the properties of `test_fuzz.py` with random seeds for a bounded time, and print what each came to.

Each has its share of the time. Where atheris is installed, the request parser has another, larger one: libFuzzer
looks for requests that reach new branches of it. What fails is printed with its smallest example, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLE_TIME = 5
"""Seconds after which an example hangs."""
GRACE = 60
"""Seconds beyond its share in which what failed is made smaller."""
INSTRUMENTED = ["selfupdate.connection", "http.server", "http.client", "email.feedparser", "email.parser"]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def hang(_number: int, _frame: object) -> None:
        raise TimeoutError(f"this example takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_property(test: Any, seconds: float) -> tuple[int, str]:
    """Return how many examples a property had in `seconds`, and how it failed, or nothing."""
    count = 0
    hold: Callable[..., None] = test.hypothesis.inner_test
    until = time.monotonic() + seconds

    @functools.wraps(hold)
    def hold_in_time(*arguments: Any, **named: Any) -> None:
        nonlocal count
        count += 1
        with time_limit(EXAMPLE_TIME):
            hold(*arguments, **named)

    test.hypothesis.inner_test = hold_in_time
    try:
        while time.monotonic() < until:
            test()
    except Exception:  # noqa: BLE001 - whatever it was, it is what is looked for
        return count, traceback.format_exc()
    return count, ""


def try_guided(seconds: float) -> tuple[int, str]:
    """Do as `try_property` does for the request parser, in a process of its own: libFuzzer ends it."""
    with tempfile.TemporaryDirectory() as directory:
        output = subprocess.run(
            [sys.executable, __file__, "--guided", directory, "--seconds", str(seconds)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=seconds + GRACE,
        )
    found = re.search(r"number_of_executed_units: *([0-9]+)", output.stderr)
    failure = (output.stdout or output.stderr[-2000:]) if output.returncode else ""
    return int(found[1]) if found else 0, failure


def guide(directory: Path, seconds: float) -> None:
    """Let libFuzzer make requests, and leave by its exit."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        properties: Any = importlib.import_module("test_fuzz")

    def check(data: bytes) -> None:
        """Send it cut into pieces of one length, which its first byte says."""
        length, raw = data[0] if data else 0, data[1:]
        cuts = [length] * (len(raw) // length) if length > 3 else []
        try:
            properties.check_conversation(raw, cuts, ends_connections=length == 1, leaves=length % 2 == 0)
        except BaseException:
            print(f"fails: check_conversation({raw!r}, {cuts}, …)", flush=True)
            raise

    for number, line in enumerate(properties.LINES):
        (directory / str(number)).write_bytes(b"\0POST /x HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n\r\nabc")
    limits = [f"-max_total_time={seconds:.0f}", f"-timeout={EXAMPLE_TIME}", "-rss_limit_mb=1024", "-max_len=2048"]
    atheris.Setup(
        [sys.argv[0], *limits, "-print_final_stats=1", f"-artifact_prefix={directory}/", str(directory)], check
    )
    atheris.Fuzz()


def try_all(seconds: float) -> bool:
    """Print a line for each property, and tell whether all held."""
    found: Any = importlib.import_module("test_fuzz")
    tries: dict[str, Callable[[float], tuple[int, str]]] = {
        name: lambda share, test=test: try_property(test, share)  # type: ignore[misc]  # its type is told above
        for name, test in vars(found).items()
        if hasattr(test, "hypothesis")
    }
    if importlib.util.find_spec("atheris"):
        tries["test_requests, guided"] = try_guided
    end = time.monotonic() + seconds
    held = True
    print(f"{'target':<28} {'examples':>9} {'failures':>9}", flush=True)
    weights = {name: 4 if attempt is try_guided else 1 for name, attempt in tries.items()}
    for name, attempt in tries.items():
        share = weights[name] / sum(weights.values())
        count, failure = attempt(max(1.0, share * (end - time.monotonic())))
        del weights[name]
        print(f"{name.removeprefix('test_'):<28} {count:>9} {int(bool(failure)):>9}", flush=True)
        if failure:
            print(failure, flush=True)
            held = False
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description="try the properties of test_fuzz.py with random seeds")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of them together")
    parser.add_argument("--guided", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["HYPOTHESIS_PROFILE"] = "long"
    logging.disable()
    if arguments.guided:
        guide(arguments.guided, arguments.seconds)
    faulthandler.dump_traceback_later(arguments.seconds + 2 * GRACE, exit=True)
    sys.exit(not try_all(arguments.seconds))


if __name__ == "__main__":
    main()
