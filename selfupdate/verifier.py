"""The platform's own programs that check signatures, and how they are run.

Each is named by an absolute path, and gets nothing of this process's
environment, which could steer it (PATH, LD_PRELOAD, TZ, OPENSSL_CONF). It works
in a new directory that holds copies of all that it is to read, but for the data
themselves, which it gets on standard input. What it tells of its status goes there, too.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from selfupdate import process
from selfupdate.errors import CandidateError, TrustError
from selfupdate.foreign import shown
from selfupdate.system import TOOL_DIRECTORIES, TOOL_ENVIRONMENT, TOOL_SUFFIX

DIRECTORIES = tuple(map(Path, TOOL_DIRECTORIES))
"""Where the programs are looked for."""

STATUS_FD = "{status}"
"""Stands in the arguments for the descriptor that takes a program's status, apart from what a signature can say."""

_OUTPUT_SIZE = 1 << 16
_SMALL_TIME = 5.0
"""Seconds for what has no file to read through."""


class Answer(NamedTuple):
    """What a program said."""

    status: int
    stdout: bytes
    stderr: bytes
    on_status_fd: bytes


class Verifier:
    """One program."""

    def __init__(
        self,
        name: str,
        package: str,
        scratch: Callable[[], AbstractContextManager[Path]],
        stop_fd: int,
        time_limit: float,
    ) -> None:
        """Run `name`, which the operator finds in `package`, in directories that `scratch` lends.

        It has `time_limit` seconds to read through a file.
        """
        self.name = name
        self._package = package
        self._scratch = scratch
        self._stop_fd = stop_fd
        self._time_limit = time_limit

    def run(self, arguments: Sequence[str], files: Mapping[str, bytes], data: Path | bytes = b"") -> Answer:
        """Run it in a directory with `files`, with `data`, or the content of a file, on standard input.

        Raises TrustError where it is not there, CandidateError where it came to no answer.
        """
        time_limit = self._time_limit if isinstance(data, Path) else _SMALL_TIME
        paths = (directory / f"{self.name}{TOOL_SUFFIX}" for directory in DIRECTORIES)
        program = next((path for path in paths if path.is_file()), None)
        if program is None:
            raise TrustError(f"{self.name} was not found", "verifier-missing", f"install {self._package}")
        try:
            with self._scratch() as directory:
                return self._run([str(program), *arguments], directory, files, data, time_limit)
        except process.TooSlowError:
            raise self._no_answer("timeout", f"no answer within {time_limit:g} s") from None
        except (process.TooMuchOutputError, process.LeftProcessesError) as error:
            raise self._no_answer("error", type(error).__name__) from None
        except OSError as error:
            raise self._no_answer("error", error.strerror or str(error)) from error

    def _run(
        self, command: list[str], directory: Path, files: Mapping[str, bytes], data: Path | bytes, time_limit: float
    ) -> Answer:
        if isinstance(data, bytes):
            files, data = {**files, "data": data}, directory / "data"
        for name, content in files.items():
            (directory / name).write_bytes(content)
        with data.open("rb") as stdin, (directory / ".status").open("x+b") as status:
            output = process.capture(
                [word.replace(STATUS_FD, str(status.fileno())) for word in command],
                TOOL_ENVIRONMENT,
                directory,
                stdin=stdin.fileno(),
                fds=[status.fileno()],
                time_limit=time_limit,
                size_limit=_OUTPUT_SIZE,
                stop_fd=self._stop_fd,
            )
            if output.status < 0:
                raise self._no_answer("crashed", f"it {process.ending(output.status)}")
            status.seek(0)
            return Answer(output.status, output.stdout, output.stderr, status.read(_OUTPUT_SIZE))

    def no_answer(self, answer: Answer) -> CandidateError:
        """Return the error for an answer that is none of the known ones."""
        said = answer.stderr.strip() or answer.stdout.strip()
        return self._no_answer("error", f"it ended with status {answer.status}: {shown(said, 200)}")

    def _no_answer(self, kind: str, why: str) -> CandidateError:
        return CandidateError(
            f"the signature check did not finish: {self.name}: {why}", f"verifier-{kind}", "it is tried again"
        )
