"""A real systemd for the tests: the first process of namespaces of its own, with nothing but the units given to it.

/usr is this machine's; /etc is, too, and what is written there is gone with the test; all else is empty.
"""

from __future__ import annotations

import secrets
import socket
import tempfile
from pathlib import Path
from typing import Self

from namespaces import ENVIRON, Inhabitant, Inside, Namespaces, cannot
from service import PATIENCE

_INIT = Path("/lib/systemd/systemd")
_UNITS = Path("/etc/systemd/system")
_OF_THIS_MACHINE = (
    *(f"{name}.target" for name in ("basic", "multi-user", "network", "shutdown", "sockets", "sysinit")),
    *("systemd-journald.service", "systemd-journald.socket"),
)
_SETUP = f"""
umount -R -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for empty in /run /var /opt /root /home; do mount -t tmpfs -o mode=755 tmpfs $empty; done
mkdir -p /run/etc/new /run/etc/work /run/host /var/lib /var/log /var/tmp
ln -s /run /var/run
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/new,workdir=/run/etc/work overlay /etc
mount --bind "$SHARED" /run/host
mount -t tmpfs -o mode=1777 tmpfs /tmp
rm -rf {_UNITS} /etc/machine-id
mkdir -p {_UNITS}/sysinit.target.wants
cd /lib/systemd/system && cp {" ".join(_OF_THIS_MACHINE)} {_UNITS}
ln -s ../systemd-journald.service {_UNITS}/sysinit.target.wants/
printf '[Journal]\\nReadKMsg=no\\n' > /etc/systemd/journald.conf
tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id
for quiet in /dev/console /dev/kmsg; do test ! -e $quiet || mount --bind /dev/null $quiet; done
cd /"""


class Systemd(Namespaces):
    """Boots, and ends with the context."""

    def __init__(self) -> None:
        self.groups = _hierarchy() / f"self-update-{secrets.token_hex(4)}"
        """The directory of its control groups."""
        # Not below the tests' own directory: a socket's path may have 107 bytes.
        self._shared = tempfile.TemporaryDirectory(prefix="systemd-")
        super().__init__(
            [_INIT, "--system", "--unit=multi-user.target", "--show-status=no", "--log-target=journal"],
            kinds=("uts", "ipc", "cgroup"),
            setup=_SETUP,
            environ={
                **ENVIRON,
                "SHARED": self._shared.name,
                "NOTIFY_SOCKET": "/run/host/notify",
                "SYSTEMD_UNIT_PATH": str(_UNITS),
                "container": "tests",
            },
            before=["sh", "-c", 'echo $$ > "$0" && exec "$@"', self.groups / "cgroup.procs"],
        )

    def __enter__(self) -> Self:
        if not _INIT.exists():
            cannot("systemd is not installed; .ci/run installs what the tests use")
        try:
            self.groups.mkdir()
        except OSError as error:
            cannot(f"systemd needs a group of processes of its own (cgroups(7)): {error}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as news:
            news.bind(f"{self._shared.name}/notify")
            news.settimeout(PATIENCE)
            super().__enter__()
            try:
                while b"READY=1" not in news.recv(4096).split(b"\n"):
                    pass
            except BaseException:
                self.close()
                raise
        return self

    def close(self) -> None:
        super().close()
        for group in sorted(self.groups.rglob("*/"), reverse=True):
            group.rmdir()
        self.groups.rmdir()
        self._shared.cleanup()

    def install(self, name: str, text: str) -> None:
        """Write a unit, or a part of one, and have systemd read it."""
        path = self.root / _UNITS.relative_to("/") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self.run("systemctl", "daemon-reload")


class Unit(Inside):
    """A service of systemd's: its state, and what its journal says."""

    def __init__(self, systemd: Systemd, name: str) -> None:
        """Follow the journal of the unit `name`, systemd's own words about it included, from its beginning."""
        follow = ("journalctl", f"--unit={name}", "--output=cat", "--follow", "--lines=all")
        super().__init__(systemd, systemd.start(*follow))
        self.name = name

    def systemctl(self, verb: str, *flags: str) -> None:
        """Have systemd do something with it, and wait until that is done, unless a flag says otherwise."""
        self.namespaces.run("systemctl", verb, *flags, self.name)

    def show(self, *names: str) -> list[str]:
        """Return properties of it, in this order."""
        shown = self.namespaces.run("systemctl", "show", self.name, *(f"--property={name}" for name in names)).stdout
        values = dict(line.split("=", 1) for line in shown.splitlines())
        return [values[name] for name in names]

    @property
    def main_pid(self) -> int:
        return int(self.show("MainPID")[0])

    def processes(self) -> list[Inhabitant]:
        """Return the processes in the unit's control group."""
        group = self.show("ControlGroup")[0]
        if not group:
            return []
        numbers = self.namespaces.run("cat", f"/sys/fs/cgroup{group}/cgroup.procs").stdout.split()
        return [process for process in self.namespaces.inhabitants() if str(process.pid) in numbers]


def _hierarchy() -> Path:
    """Return where the hierarchy of control groups of version 2 is mounted."""
    mounts = (line.partition(" - ") for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines())
    place = next((place for place, _, kind in mounts if kind.startswith("cgroup2 ")), None)
    return Path(place.split()[4]) if place else cannot("systemd needs control groups of version 2")
