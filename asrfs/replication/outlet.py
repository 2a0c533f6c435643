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
from asrfs.protocol.messages import Compare, Compared, HandedOver, encode_message

ANSWER_S_MAX = 600.0
"""The store reads what it never held in memory; but it does not take for ever."""


class _Asked:
    """A request the store was asked, or is about to be. `scope` holds who waits for its answer."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.answer: Compared | None = None


class _Line:
    """One session's. A turn is given back by the answer: who asked may have gone, and the store counts all the same."""

    def __init__(self, send: Callable[[Compare | HandedOver], Awaitable[None]], at_once: int) -> None:
        self.send = send
        self.at_once = at_once
        self.turns = trio.Semaphore(at_once)
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
    def opened(self, send: Callable[[Compare | HandedOver], Awaitable[None]], at_once: int) -> Iterator[None]:
        """A session streams while this lasts. `at_once`: how many requests its store takes, 0 for one that cannot."""
        line = self._line = _Line(send, at_once)
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

    def answered(self, answer: Compared) -> None:
        """The store's word. Raises ProtocolError for an answer to nothing that was asked."""
        line = self._line
        assert line is not None
        asked = line.asked.pop(answer.number, None)
        if asked is None:
            raise ProtocolError(f"the store answered request {answer.number}, which waits for no answer")
        line.turns.release()
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
        asked = _Asked()
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
            raise error_class(answer.exit_code)(foreign_line(answer.text) or "the store cannot compare this disk")
        return answer

    async def say(self, word: HandedOver) -> None:
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

    async def _exchange(self, line: _Line, request: Compare, asked: _Asked) -> None:
        await line.turns.acquire()
        line.number += 1
        numbered = msgspec.structs.replace(request, number=line.number)
        line.asked[numbered.number] = asked
        try:
            await line.send(numbered)
        except BaseException:  # it was not said, so nobody will answer
            del line.asked[numbered.number]
            line.turns.release()
            raise
        self.bytes_sent += FRAME_HEADER_BYTES + len(encode_message(numbered))
        await asked.done.wait()
