"""The composition root: it alone reads the arguments, the environment and signals, and it alone exits."""

import gc
import os
import sys

from selfupdate import __version__


def main() -> None:
    """Run the program, and exit."""
    # `-version` is asked of every candidate at every first sight of it: it answers before anything is imported.
    if sys.argv[1:] in (["-version"], ["--version"]):
        print(__version__)
        return
    gc.disable()  # what a start makes stays; the service looks for garbage behind that, and a command leaves none
    from selfupdate.service import run

    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        status = status or 1
        if not isinstance(error, BrokenPipeError):  # who has read enough needs no word
            print(f"self-update: what was printed is not all there: {error.strerror}", file=sys.stderr)
    sys.stderr.flush()
    # Not sys.exit: while the interpreter takes itself apart, a second stop signal would kill it,
    # and a thread that still writes to a stream would make it abort. All that has an end has ended.
    os._exit(status)


if __name__ == "__main__":
    main()
