"""The connections of one port: how many there are, who has said something, who is to be cut. An engine.

Connections are known by libzmq's file descriptors, whose numbers are used again: :meth:`Connections.ended` has to be
told of each before the next one that gets its number. Times are monotonic seconds.
"""

from __future__ import annotations

from typing import Final, NamedTuple

PATIENCE: Final = 10.0
"""Seconds within which a peer has to say something after it connected, and again after it was forgotten for silence."""
IDLE: Final = 120.0
"""Seconds without a message after which a peer that only fetches, uploads or records is taken for silent."""
FAREWELL: Final = 0.25
"""Seconds that a GOODBYE has to get to a peer which is cut then."""


class Cut(NamedTuple):
    """A connection to be cut, the address of its peer, and why: '' where that was said already."""

    number: int
    address: str
    reason: str
    text: str


class Ended(NamedTuple):
    """A connection that has ended; ``sender`` is the routing id of its peer, b'' if that was never heard.
    ``was_told``: to go, and why; it may have gone before it was cut."""

    number: int
    address: str
    sender: bytes
    was_cut: bool
    was_told: bool


class _Connection:
    def __init__(self, address: str, due: float) -> None:
        self.address = address
        self.user = ""
        """The public key of the peer, once it has said something."""
        self.sender = b""
        """Its routing id, likewise."""
        self.due = due
        """When it is cut unless it says something; infinity for one that is heard otherwise."""
        self.parting = False
        """Whether it was told to go."""


class Connections:
    """``most`` at a time; where there are more, the oldest that has not said anything makes room."""

    def __init__(self, most: int, patience: float = PATIENCE) -> None:
        self.most = most
        self._patience = patience
        self._open: dict[int, _Connection] = {}
        """In the order in which they came."""
        self._cuts: list[Cut] = []
        self._cut: dict[int, _Connection] = {}
        """Those that were cut, until they have ended."""
        self._due = float("inf")
        """No connection is due before."""

    def __len__(self) -> int:
        return len(self._open)

    # ---- what happened --------------------------------------------------------------------

    def accepted(self, now: float, number: int, address: str) -> None:
        """Somebody has connected."""
        self._open[number] = _Connection(address, now + self._patience)
        self._due = min(self._due, now + self._patience)
        if len(self._open) > self.most:
            silent = (other for other, each in self._open.items() if not each.sender)
            self._take(next(silent, number), "connections", f"more than {self.most} connections (--max-connections)")

    def ended(self, number: int) -> Ended:
        """A connection has ended, by itself or as it was cut."""
        cut = self._cut.pop(number, None)
        connection = cut or self._open.pop(number, None)
        if connection is None:
            return Ended(number, "", b"", False, False)
        return Ended(number, connection.address, connection.sender, cut is not None, connection.parting)

    def heard(self, now: float, number: int, sender: bytes, user: str, stays: bool) -> None:
        """Over a connection came a greeting (``stays``: the peer is heard again and again, and :meth:`forgotten` else),
        or a message that needs none."""
        connection = self._open.get(number)
        if connection is None:
            return  # it is being cut
        connection.user, connection.sender = user, sender
        if connection.parting:
            return
        if stays:
            connection.due = float("inf")
        elif connection.due < float("inf"):
            connection.due = now + IDLE

    def forgotten(self, now: float, number: int) -> None:
        """The peer is known no more, but for its connection, over which it may greet again."""
        connection = self._open.get(number)
        if connection is not None and not connection.parting:
            connection.due = now + self._patience
            self._due = min(self._due, connection.due)

    def part(self, now: float, number: int) -> None:
        """The peer was told to go: cut the connection in a moment, unless it goes by itself."""
        connection = self._open.get(number)
        if connection is not None and not connection.parting:
            connection.parting = True
            connection.due = now + FAREWELL
            self._due = min(self._due, connection.due)

    def address(self, number: int) -> str:
        """Where the peer of a connection is; '' where that is not known."""
        connection = self._open.get(number)
        return connection.address if connection is not None else ""

    def users(self) -> dict[int, str]:
        """The public keys of those who have said something and were not told to go, by connection."""
        return {number: each.user for number, each in self._open.items() if each.sender and not each.parting}

    # ---- what to do -------------------------------------------------------------------------

    def due(self) -> float:
        """When :meth:`take_cuts` may have something."""
        return float("-inf") if self._cuts else self._due

    def take_cuts(self, now: float) -> list[Cut]:
        """The connections to be cut by ``now``. They count no more."""
        if now >= self._due:
            for number in [number for number, each in self._open.items() if now >= each.due]:
                if self._open[number].parting:
                    self._take(number, "", "")
                else:
                    self._take(number, "silent", "it is connected and says nothing")
            self._due = min((each.due for each in self._open.values()), default=float("inf"))
        cuts, self._cuts = self._cuts, []
        return cuts

    def _take(self, number: int, reason: str, text: str) -> None:
        connection = self._open.pop(number)
        self._cut[number] = connection
        self._cuts.append(Cut(number, connection.address, reason, text))
