"""The composition root: it alone reads the arguments, and it alone exits."""

import sys

from selfupdate import __version__


def main() -> None:
    """Run the program, and exit."""
    if sys.argv[1:] in (["-version"], ["--version"]):
        print(__version__)
        return
    sys.exit("self-update: it can only tell its -version so far")


if __name__ == "__main__":
    main()
