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
from selfupdate.state import signature

if TYPE_CHECKING:
    from collections.abc import Mapping

    from selfupdate.settings import Settings

_TIMEOUT = 60.0
_AGAIN = 0.05
"""Seconds until a service that does not answer is asked again; nothing tells when it does."""
_LONG_POLL = 20
"""Seconds that one request waits for the next phase."""


class ClientError(StartError):
    """The service cannot be asked, or refuses: print the text, exit with 1."""


class Client:
    """Asks the service that runs with these settings."""

    def __init__(self, settings: Settings) -> None:
        """Find the service."""
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
        """Print how the service stands; return the exit status."""
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
        try:
            listing = self._get("/candidates")
        except ClientError as error:  # upgrades are off, which is how things stand
            print(error)
            return 0
        print(f"an upgrade would take {listing['latest']}" if listing["latest"] else "nothing is newer")
        for candidate in listing["candidates"]:
            if candidate["reason"]:
                print(f"  {candidate['name']}{_why(candidate)}")
        return 0

    def apply(self) -> int:
        """Ask for an upgrade, print each phase as it comes; return 0 when it is committed or nothing is newer."""
        record = self._post("/upgrade")
        if record.get("outcome") == "up-to-date":
            print(f"up to date: {record['current']}")
            return 0
        return self._follow(record)

    def roll_back(self) -> int:
        """Ask for a rollback, and do as `apply` does."""
        return self._follow(self._post("/rollback"))

    def _follow(self, record: Mapping[str, Any]) -> int:
        printed = 0
        while True:
            for entry in record["timeline"][printed:]:
                print(f"{entry['at']} {entry['phase']}", flush=True)
            printed = len(record["timeline"])
            if record["outcome"] is not None and (record["outcome"] != "committed" or record["installed"] is not None):
                break
            record = self._get(f"/upgrades/{record['id']}?wait={_LONG_POLL}s&seen={printed}", patience=_TIMEOUT)
        journey = f"{record['from']} -> {record['to']}" if record["to"] else record["from"]
        print(f"{record['outcome']}: {journey}{_why(record)}")
        if record["installed"] is False:
            print(f"a restart will bring another version: {record['not_installed']}")
        return 0 if record["outcome"] == "committed" else 1

    def _get(self, path: str, patience: float = 0.0) -> Any:
        return self._ask("GET", path, patience)

    def _post(self, path: str) -> Any:
        return self._ask("POST", path, 0.0)

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
        if status == http.client.UNAUTHORIZED:
            raise ClientError("the service wants its token; name the file that holds it with -token-file")
        if status >= http.client.BAD_REQUEST:
            raise ClientError(str(value.get("detail", f"the service answered {status}")))
        return value

    def _exchange(self, method: str, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("localhost")
        try:
            connection.sock = listeners.connect(self._address, _TIMEOUT)
            headers = {"Host": "localhost", "Connection": "close"}
            headers |= {"Authorization": f"Bearer {self._token}"} if self._token else {}
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


def _why(refused: Mapping[str, Any]) -> str:
    """Return the reason and the remedy of whatever has them."""
    remedy = f"; to mend it: {refused['remedy']}" if refused.get("remedy") else ""
    return f": {refused['reason']}{remedy}" if refused["reason"] else ""
