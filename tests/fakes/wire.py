"""Both ends of one replication session with nothing between them: bytes carried as the test likes.

`carry` takes what one end sent and feeds it to the other in pieces: one byte at a time, all at once, or cut where the
test says. No task, no clock, no socket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from asrfs.protocol.messages import Message, ObjectBegin
from asrfs.protocol.session import Bytes, Event, Role, Session

Cut = Callable[[bytes], Iterable[bytes]]


def all_at_once(sent: bytes) -> Iterator[bytes]:
    if sent:
        yield sent


def byte_by_byte(sent: bytes) -> Iterator[bytes]:
    for at in range(len(sent)):
        yield sent[at : at + 1]


def cut_at(*places: int) -> Cut:
    """In pieces that end at these places, the rest in one."""

    def cut(sent: bytes) -> Iterator[bytes]:
        edges = [0, *sorted({min(max(place, 0), len(sent)) for place in places}), len(sent)]
        for i in range(len(edges) - 1):
            if piece := sent[edges[i] : edges[i + 1]]:
                yield piece

    return cut


class SessionPair:
    """`events[role]`: what that end has heard. What an end has sent waits until `carry`."""

    def __init__(self) -> None:
        self.ends: dict[Role, Session] = {"host": Session("host"), "store": Session("store")}
        self.events: dict[Role, list[Event]] = {"host": [], "store": []}
        self.sent: dict[Role, bytearray] = {"host": bytearray(), "store": bytearray()}

    def say(self, role: Role, message: Message) -> None:
        self.sent[role] += self.ends[role].send(message)

    def say_object(self, begin: ObjectBegin, pieces: list[bytes]) -> None:
        for buffer in self.ends["host"].send_object(begin, pieces):
            self.sent["host"] += buffer

    def carry(self, sender: Role, cut: Cut = all_at_once) -> list[Event]:
        """Deliver everything `sender` has sent; what the other end made of it."""
        receiver: Role = "store" if sender == "host" else "host"
        heard: list[Event] = []
        for piece in cut(bytes(self.sent[sender])):
            heard += self.ends[receiver].receive(piece)
        self.sent[sender].clear()
        self.events[receiver] += heard
        return heard

    def inject(self, receiver: Role, received: Bytes) -> list[Event]:
        """Deliver bytes that nobody here has sent."""
        return self.ends[receiver].receive(received)
