"""A machine's part in one point of its group: the words that it says, whatever goes wrong around them."""

from __future__ import annotations

import trio
import trio.testing

from asrfs.consistency.group_share import AtInstant, GroupNames, GroupShare
from asrfs.errors import TemporaryError
from asrfs.model.marker import MarkerRecord
from asrfs.protocol.group_messages import Gather, Gathered, Prepare, Ready, Release, Released, Word
from tests.fakes.group_world import MemoryServer

POINT, SELF = "a" * 32, "1" * 32


class FailsAfterwards:
    """What was quiesced was so, and to undo it fails: as where a hook is killed."""

    async def at_instant(self, marker: MarkerRecord, do: AtInstant) -> None:
        await do(marker, None)
        raise TemporaryError("the process that froze was killed")


async def test_who_has_said_that_it_is_over_says_no_more_of_it(autojump_clock: trio.testing.MockClock) -> None:
    """The coordinator may have begun the next point by then."""
    said: list[Word] = []
    tell, told = trio.open_memory_channel[Word](4)
    names = GroupNames("shop", (SELF,))
    share = GroupShare(MemoryServer(lambda: 0.001), FailsAfterwards(), names, said.append, told, lambda seconds: None)
    async with trio.open_nursery() as nursery:
        gather = Gather(point=POINT, generation=1, consistency="application", seconds=10, hold_s=1)
        nursery.start_soon(share.run, gather)
        for word in (Prepare(point=POINT), Release(point=POINT)):
            await trio.sleep(0.1)  # sleep: virtual, until it has answered
            await tell.send(word)
    assert [type(word) for word in said] == [Gathered, Ready, Released]
