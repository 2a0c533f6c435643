"""Which log objects make up a history when nothing but the objects is there. Pure.

Each object names the digest of the one before, so histories are chains. There may be side branches: objects whose
store died before the catalog, and so the host, knew of them, and objects of an epoch that has been superseded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Link(Protocol):
    """What a chain is made of. LSNs are inclusive."""

    @property
    def epoch(self) -> int: ...
    @property
    def first_lsn(self) -> int: ...
    @property
    def last_lsn(self) -> int: ...
    @property
    def digest(self) -> bytes: ...


class Found(NamedTuple):
    """A log object and the digest it names as the one before."""

    link: Link
    previous_digest: bytes


class _Reach(NamedTuple):
    epoch: int
    last_lsn: int


def best_chain(found: Iterable[Found], after_lsn: int, after_digest: bytes) -> list[Link]:
    """The chain that goes on after `after_lsn`: of the highest epoch, then the longest.

    A superseded epoch thus never wins over the one that superseded it (I6), and nothing that was acknowledged is left
    out: what a store acknowledged is continued by all that it took later.
    """
    children: dict[tuple[int, bytes], list[tuple[_Reach, Link]]] = {}
    for candidate in sorted(found, key=lambda each: (-each.link.first_lsn, each.link.digest)):
        link = candidate.link
        reach = _Reach(link.epoch, link.last_lsn)
        for onward, child in children.get((link.last_lsn + 1, link.digest), ()):
            if child.epoch >= link.epoch:
                reach = max(reach, onward)
        children.setdefault((link.first_lsn, candidate.previous_digest), []).append((reach, link))
    chain: list[Link] = []
    at, epoch = (after_lsn + 1, after_digest), 0
    while onward_links := [each for each in children.get(at, ()) if each[1].epoch >= epoch]:
        _, link = max(onward_links, key=lambda each: each[0])
        chain.append(link)
        at, epoch = (link.last_lsn + 1, link.digest), link.epoch
    return chain
