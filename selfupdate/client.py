"""The service's commands: ask the running service over HTTP, and say in words what it answers.

The service is found by what it wrote into the state directory's lock, or else at the first `-bind`.
"""

from __future__ import annotations

import http.client
import json
import time
from typing import TYPE_CHECKING, Any

from selfupdate import listener as listeners
from selfupdate import process
from selfupdate.access import read_token
from selfupdate.errors import StartError
from selfupdate.foreign import shown
from selfupdate.progress import Progress, journey
from selfupdate.state import signature

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from selfupdate.settings import Settings
    from selfupdate.terminal import Terminal

_TIMEOUT = 60.0
_AGAIN = 0.05
"""Seconds until a service that does not answer is asked again; nothing tells when it does."""
_LONG_POLL = 20
"""Seconds that one request waits for the next phase."""


class ClientError(StartError):
    """The service cannot be asked, or refuses: print the text, exit with 1."""


class _NotFoundError(ClientError):
    """The service knows no such thing."""


class Client:
    """Asks the service that runs with these settings."""

    def __init__(self, settings: Settings, terminal: Terminal) -> None:
        """Find the service; an upgrade is shown on `terminal`, which may be none."""
        self._terminal = terminal
        self._progress = Progress(terminal)
        signed = signature(settings.state_dir).get("bind")
        try:
            self._address = listeners.parse_address(signed) if signed else settings.bind[0]
        except ValueError:
            raise ClientError(
                f"the lock in {settings.state_dir} names no address; remove it, and start the service"
            ) from None
        self._json = settings.json
        self._token = read_token(settings.token_file) if settings.token_file else None

    def status(self) -> int:
        """Print how the service stands, on a terminal until an upgrade that is under way has ended; return 0."""
        status = self._get("/status")
        if self._json:
            print(json.dumps(status, indent=2))
            return 0
        print(f"{status['version']} on {status['bind']}: {status['phase']}, process {status['pid']}")
        print(f"started at {status['started_at']}, generation {status['generation']}")
        installed = status["installed"]
        if installed["version"] != status["version"]:
            why = f": {installed['reason']}" if installed["reason"] else ""
            print(f"a restart will bring {installed['version']}{why}")
        trust = status["trust"]
        if trust["running"]:
            print(f"signed by {trust['running']['name']}" + _why(trust["running"]))
        if not trust["checked"]:
            print("signatures are not checked: whoever can write to the upgrade directory decides what runs")
        if status["upgrade"]:
            self._show_upgrade(status["upgrade"])
        else:
            self._show_candidates()
        return 0

    def _show_upgrade(self, record: Mapping[str, Any]) -> None:
        """Follow an upgrade that somebody began, or print once how it stands."""
        if not self._terminal.redraws:
            print(shown(f"{record['kind']} under way: {journey(record)}"))
        if not self._terminal.has_reader:
            self._progress.show(record)
            return
        try:
            self._follow(record)
        except _NotFoundError:
            print("nothing came of the upgrade: there was no candidate for it")

    def _show_candidates(self) -> None:
        try:
            listing = self._get("/candidates")
        except ClientError as error:  # upgrades are off, which is how things stand
            print(error)
            return
        print(f"an upgrade would take {listing['latest']}" if listing["latest"] else "nothing is newer")
        for candidate in listing["candidates"]:
            if candidate["reason"]:
                print(f"  {candidate['name']}{_why(candidate)}")

    def apply(self) -> int:
        """Ask for an upgrade, show how it goes; return 0 when it is committed or nothing is newer."""
        record = self._begin("/upgrade")
        if record.get("outcome") == "up-to-date":
            self._progress.erase()
            print(f"up to date: {record['current']}")
            return 0
        return self._follow(record)

    def roll_back(self) -> int:
        """Ask for a rollback, and do as `apply` does."""
        return self._follow(self._begin("/rollback"))

    def _begin(self, path: str) -> Any:
        """Ask for an upgrade or a rollback; return what is answered when a candidate is chosen."""
        self._progress.begin()
        try:
            return self._ask("POST", path, 0.0)
        except BaseException:
            self._progress.erase()
            raise

    def _follow(self, record: Mapping[str, Any]) -> int:
        try:
            while not _has_settled(record):
                self._progress.show(record)
                seen = len(record["timeline"])
                record = self._get(f"/upgrades/{record['id']}?wait={_LONG_POLL}s&seen={seen}", patience=_TIMEOUT)
        except _NotFoundError:
            self._progress.erase()
            raise
        except BaseException as error:
            self._progress.leave()
            if self._terminal.has_reader and isinstance(error, KeyboardInterrupt):
                print("it goes on without this command; -status shows how")
            raise
        self._progress.end(record)
        print(shown(f"{record['outcome']}: {journey(record)}{_why(record)}"))
        if record["installed"] is False:
            print(f"a restart will bring another version: {record['not_installed']}")
        return 0 if record["outcome"] == "committed" else 1

    def _get(self, path: str, patience: float = 0.0) -> Any:
        return self._ask("GET", path, patience)

    def _ask(self, method: str, path: str, patience: float) -> Any:
        """Return the JSON of a success. Raises ClientError; a service that is being handed over may take `patience`."""
        deadline = time.monotonic() + patience
        while True:
            try:
                status, value = self._exchange(method, path)
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                if time.monotonic() >= deadline:
                    why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
                    raise ClientError(
                        f"no service answers on {self._address} ({why}); start it, or name its -state-dir or -bind"
                    ) from None
            process.ready([], time.monotonic() + _AGAIN)
            self._progress.tick()
        if status == http.client.UNAUTHORIZED:
            raise ClientError("the service wants its token; name the file that holds it with -token-file")
        if status >= http.client.BAD_REQUEST:
            kind = _NotFoundError if status == http.client.NOT_FOUND else ClientError
            raise kind(str(value.get("detail", f"the service answered {status}")))
        return value

    def _exchange(self, method: str, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("localhost")
        try:
            connection.sock = listeners.connect(self._address, _TIMEOUT)
            headers = {"Host": "localhost", "Connection": "close"}
            headers |= {"Authorization": f"Bearer {self._token}"} if self._token else {}
            connection.request(method, path, headers=headers)
            self._wait(connection.sock)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def _wait(self, connected: socket.socket) -> None:
        """Wait until the answer begins, and have the clock go on meanwhile. Raises TimeoutError."""
        deadline = time.monotonic() + _TIMEOUT
        while not process.ready([connected.fileno()], min(deadline, self._progress.next_tick)):
            if time.monotonic() >= deadline:
                raise TimeoutError
            self._progress.tick()


def _has_settled(record: Mapping[str, Any]) -> bool:
    return record["outcome"] is not None and (record["outcome"] != "committed" or record["installed"] is not None)


def _why(refused: Mapping[str, Any]) -> str:
    """Return the reason and the remedy of whatever has them."""
    remedy = f"; to mend it: {refused['remedy']}" if refused.get("remedy") else ""
    return f": {refused['reason']}{remedy}" if refused["reason"] else ""
