"""How others ask the store something over the session that ships, and hear its answer.

    ask ──(number)──▶ session sends between objects ─▶ store ─▶ session receives ──(number)──▶ answer

Belongs to the event loop and outlives sessions. What was asked of a session that ended is not answered: whoever asked
gets TemporaryError and may ask the next one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import msgspec
import trio

from asrfs.errors import RefusedError, TemporaryError, error_class, foreign_line
from asrfs.protocol.frames import FRAME_HEADER_BYTES, ProtocolError
from asrfs.protocol.messages import (
    FETCHES_MAX,
    Compare,
    Compared,
    Fetch,
    Fetched,
    HandedOver,
    Promoted,
    check_fetched,
    encode_message,
)

Said = Compare | Fetch | HandedOver | Promoted
Answer = Compared | Fetched

ANSWER_S_MAX = 600.0
"""The store reads what it never held in memory; but it does not take for ever."""


class _Asked:
    """A request the store was asked, or is about to be. `scope` holds who waits for its answer."""

    def __init__(self, request: Compare | Fetch | None = None) -> None:
        self.request = request
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.answer: Answer | None = None


class _Line:
    """One session's. A turn is given back by the answer: who asked may have gone, and the store counts all the same."""

    def __init__(self, send: Callable[[Said], Awaitable[None]], at_once: int, takes_fetches: bool) -> None:
        self.send = send
        self.at_once = at_once
        self.takes_fetches = takes_fetches
        self.turns: dict[type[Compare | Fetch], trio.Semaphore] = {
            Compare: trio.Semaphore(at_once),
            Fetch: trio.Semaphore(FETCHES_MAX),
        }
        self.asking: set[_Asked] = set()
        self.asked: dict[int, _Asked] = {}
        self.number = 0


class Outlet:
    """`bytes_sent`: of all that was asked, frames and all."""

    def __init__(self) -> None:
        self._line: _Line | None = None
        self._opened = trio.Event()
        self.bytes_sent = 0

    @contextmanager
    def opened(
        self, send: Callable[[Said], Awaitable[None]], at_once: int, takes_fetches: bool = False
    ) -> Iterator[None]:
        """A session streams while this lasts. `at_once`: how many COMPAREs its store takes, 0 for one that cannot."""
        line = self._line = _Line(send, at_once, takes_fetches)
        self._opened.set()
        self._opened = trio.Event()
        try:
            yield
        finally:
            self._line = None
            for asked in line.asking:
                asked.scope.cancel()

    @property
    def is_open(self) -> bool:
        return self._line is not None

    async def wait_open(self) -> None:
        """Until there is a session."""
        while self._line is None:
            await self._opened.wait()

    def answered(self, answer: Answer) -> None:
        """The store's word. Raises ProtocolError for an answer to nothing that was asked."""
        line = self._line
        assert line is not None
        asked = line.asked.pop(answer.number, None)
        if asked is None or isinstance(answer, Fetched) is not isinstance(asked.request, Fetch):
            raise ProtocolError(f"the store answered request {answer.number}, which waits for no such answer")
        if isinstance(answer, Fetched):
            assert isinstance(asked.request, Fetch)
            check_fetched(answer, asked.request)
        line.turns[Fetch if isinstance(answer, Fetched) else Compare].release()
        asked.answer = answer
        asked.done.set()

    async def ask(self, request: Compare) -> Compared:
        """The answer to a request; its number is given here.

        Raises TemporaryError when there is no session or it ends, RefusedError when the store cannot compare, and what
        the store said instead of an answer.
        """
        line = self._line
        if line is None:
            raise TemporaryError("there is no connection to the store")
        if not line.at_once:
            raise RefusedError("the store cannot compare: it runs an older version, update it first")
        answer = await self._answer_to(line, request)
        assert isinstance(answer, Compared)
        return answer

    async def fetch(self, request: Fetch) -> Fetched:
        """The answer to a request; its number is given here. Raises as `ask` does."""
        line = self._line
        if line is None:
            raise TemporaryError("there is no connection to the store")
        if not line.takes_fetches:
            raise RefusedError("the store gives nothing back: it runs an older version, update it first")
        answer = await self._answer_to(line, request)
        assert isinstance(answer, Fetched)
        return answer

    async def _answer_to(self, line: _Line, request: Compare | Fetch) -> Answer:
        asked = _Asked(request)
        line.asking.add(asked)
        try:
            with asked.scope, trio.fail_after(ANSWER_S_MAX):
                await self._exchange(line, request, asked)
        except trio.TooSlowError:
            raise TemporaryError(f"the store did not answer within {ANSWER_S_MAX:g} s") from None
        finally:
            line.asking.discard(asked)
        answer = asked.answer
        if answer is None:
            raise TemporaryError("the connection to the store was lost before it answered")
        if answer.exit_code:
            raise error_class(answer.exit_code)(foreign_line(answer.text) or "the store cannot answer for this disk")
        return answer

    async def say(self, word: HandedOver | Promoted) -> None:
        """Say something that is not answered. Raises TemporaryError when there is no session or it ends before that; if
        it ends soon after, the store may not have heard it."""
        line = self._line
        if line is None:
            raise TemporaryError("there is no connection to the store")
        saying = _Asked()
        line.asking.add(saying)
        try:
            with saying.scope:
                await line.send(word)
                saying.done.set()
        finally:
            line.asking.discard(saying)
        if not saying.done.is_set():
            raise TemporaryError("the connection to the store was lost")

    async def _exchange(self, line: _Line, request: Compare | Fetch, asked: _Asked) -> None:
        turns = line.turns[type(request)]
        await turns.acquire()
        line.number += 1
        numbered = msgspec.structs.replace(request, number=line.number)
        line.asked[numbered.number] = asked
        try:
            await line.send(numbered)
        except BaseException:  # it was not said, so nobody will answer
            del line.asked[numbered.number]
            turns.release()
            raise
        self.bytes_sent += FRAME_HEADER_BYTES + len(encode_message(numbered))
        await asked.done.wait()
