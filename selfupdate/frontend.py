"""Where clients meet the service: what it is to listen on, and what it listens on, which it hands over as a whole."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from selfupdate.errors import StartError
from selfupdate.listener import Listener, choose, is_local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from selfupdate.listener import Address
    from selfupdate.settings import Settings

    Place = Address | Listener

_log = logging.getLogger(__name__)


class Frontend:
    """The listeners, and the addresses with the ports that they really have."""

    def __init__(self, places: Sequence[Place]) -> None:
        """Begin with the `places` that are to be served: addresses, and sockets that were passed on."""
        self.places = tuple(places)
        self.binds = tuple(place.address if isinstance(place, Listener) else place for place in places)
        self.listeners: tuple[Listener, ...] = ()

    def open(self, listeners: Sequence[Listener]) -> None:
        """Be met on `listeners`, and on no others."""
        self.listeners = tuple(listeners)
        self.binds = tuple(listener.address for listener in listeners)

    def leave(self) -> None:
        """Let go of what was passed on: this process does not serve there, and will not."""
        if not self.listeners:
            for place in self.places:
                if isinstance(place, Listener):
                    place.sock.close()

    def remove_paths(self) -> None:
        """Remove the paths of Unix sockets: nobody will serve there any more."""
        for listener in self.listeners:
            listener.remove()


def find_places(
    settings: Settings, passed: Sequence[Listener], *, is_successor: bool, has_token: bool
) -> Sequence[Place]:
    """Return what is to be served, of the addresses and of the sockets that were `passed` on. Raises StartError."""
    places = choose(settings.bind, passed)
    for listener in passed:
        if listener in places:
            _check_reach(listener, settings, has_token=has_token)
        else:
            _log.warning("a socket that was passed on is not served", extra={"socket": listener.name})
            listener.sock.close()
    if not is_successor and "bind" in settings.given:
        for address in settings.bind:
            if not address.passed and address not in places:
                _log.warning("sockets were passed on: an address is not bound", extra={"bind": str(address)})
    return places


def _check_reach(listener: Listener, settings: Settings, *, has_token: bool) -> None:
    """Refuse to serve others with less than `-bind` would ask for. Raises StartError."""
    if is_local(listener.sock):
        return
    what = f"the socket that was passed on for {listener.address} can be reached from other machines"
    if settings.insecure_allow_unsigned:
        raise StartError(f"{what}, and signatures are not checked; give -allowed-signers FILE")
    if not has_token:
        raise StartError(f"{what}; give the token that a POST must bear with -token-file FILE")
