"""A connection between a member and its coordinator as tasks: words that are said go out in order, words that come are
handed on, and silence ends it.

Saying never waits: what is said lies in a queue until the stream takes it, so that a peer that reads slowly holds up no
other one. The queue is bounded; who lets it run full is cut off.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from asrfs.errors import AsrfsError
from asrfs.protocol.group_messages import Beat, Word
from asrfs.protocol.group_session import GroupRole, GroupSession, GroupState
from asrfs.transport.stream import Bytes, ByteStream, LinkError, SecureStream

BEAT_S = 2.0
SILENCE_S_MAX = 3 * BEAT_S
QUEUED_MAX = 256
LAST_WORD_S_MAX = 1.0
_RECEIVE_BYTES = 64 << 10


class GroupStream:
    """One end. `converse` until the peer has closed, is silent or breaks the protocol."""

    def __init__(self, stream: ByteStream, role: GroupRole) -> None:
        self._stream = stream
        self.session = GroupSession(role)
        self._queue, self._queued = trio.open_memory_channel[bytes](QUEUED_MAX)
        self._reading = trio.CancelScope()
        self._on_word: Callable[[Word], None] | None = None
        self._failure: AsrfsError | None = None
        self._secure = stream if isinstance(stream, SecureStream) else None
        """The same, where it can be used without waiting."""
        self._is_sealed = False
        self._is_idle = True
        """Whether nothing waits to be sent: then a word goes out at once, while others are held for it."""
        self.idle = trio.Event()
        """Set whenever no point is being cut over this connection; another one when one is."""

    def say(self, word: Word) -> None:
        """To the peer, after what was said before. Where the connection is over or its queue full, the word is lost and
        the connection ends."""
        self.seal(word)
        self.send_sealed()

    def seal(self, word: Word) -> None:
        """The first half of `say`, and most of the work: for who has the same to say to many, of whom the first is
        not to wait for the last. The second half has to follow at once."""
        session = self.session
        if not session.may_send(type(word)):
            return
        message = session.send(word)
        self._note_state()
        if self._is_idle and self._secure is not None:
            try:
                self._secure.seal(message)
                self._is_sealed = True
            except AsrfsError:
                self.close()
        else:
            self._enqueue(message)

    def send_sealed(self) -> None:
        """The second half of `say`."""
        if not self._is_sealed:
            return
        self._is_sealed = False
        assert self._secure is not None
        try:
            if not self._secure.send_sealed():
                self._enqueue(b"")  # the stream has the rest
        except AsrfsError:
            self.close()

    def _enqueue(self, message: bytes) -> None:
        self._is_idle = False
        try:
            self._queue.send_nowait(message)
        except trio.WouldBlock:
            self.close()

    def attend(self, seconds_max: float) -> None:
        """Wait for the peer's next word, hand it on, and do nothing else: no other task of this process runs meanwhile.

        For who knows that it comes soon and that others are held until it is answered. Where it does not, or the stream
        is none that can be waited for like this, `converse` hands it on later.
        """
        deadline = time.monotonic() + seconds_max
        try:
            while self._secure is not None and self.session.state is not GroupState.CLOSED:
                left = deadline - time.monotonic()
                if left <= 0 or self._take(self._secure.receive_now(left)) or self._secure.has_ended:
                    return
        except AsrfsError as error:
            self._failure = error
            self.close()

    def fileno(self) -> int:
        """To wait for what `attend_at_hand` hands on; -1 where that is not possible."""
        return -1 if self._secure is None or self.session.state is GroupState.CLOSED else self._secure.fileno()

    def attend_at_hand(self) -> bool:
        """`attend` to what is there already. False: this connection comes to its end, which `converse` notices."""
        if self._secure is None:
            return False
        try:
            self._take(self._secure.take())
        except AsrfsError as error:
            self._failure = error
            self.close()
        return not self._secure.has_ended and self.session.state is not GroupState.CLOSED

    def close(self) -> None:
        """End `converse` soon."""
        self.session.state = GroupState.CLOSED
        self._reading.cancel()

    async def converse(self, on_word: Callable[[Word], None]) -> None:
        """Hand on what the peer says, until it closes. `on_word` may raise AsrfsError, which ends it.

        Raises LinkError, ProtocolError, AuthenticationError.
        """
        self._on_word = on_word
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            try:
                with self._reading:
                    await self._receive()
            except AsrfsError as error:
                self._failure = error
            self.session.state = GroupState.CLOSED
            await self._send_the_rest()
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _receive(self) -> None:
        while self.session.state is not GroupState.CLOSED:
            received = None
            with trio.move_on_after(SILENCE_S_MAX):
                received = await self._stream.receive_some(_RECEIVE_BYTES)
            if received is None:
                raise LinkError(f"the {self.session.peer} was silent for {SILENCE_S_MAX:g} s")
            if not received:
                return
            self._take(received)

    def _take(self, received: Bytes) -> bool:
        """Hand on what these bytes say: whether that was anything."""
        is_any = False
        words = self.session.receive(received)
        self._note_state()
        assert self._on_word is not None
        for word in words:
            if not isinstance(word, Beat):
                is_any = True
                self._on_word(word)
        return is_any

    def _note_state(self) -> None:
        is_idle = self.session.state is GroupState.IDLE
        if is_idle:
            self.idle.set()
        elif self.idle.is_set():
            self.idle = trio.Event()

    async def _send(self) -> None:
        try:
            while True:
                message = None
                with trio.move_on_after(BEAT_S):
                    message = await self._queued.receive()
                if message is None:
                    self.say(Beat())
                else:
                    await self._stream.send_all(message)
                    self._is_idle = not self._queued.statistics().current_buffer_used
        except AsrfsError:
            self.close()

    async def _send_the_rest(self) -> None:
        """A last word, why it is over, should still arrive."""
        with trio.move_on_after(LAST_WORD_S_MAX):
            await trio.lowlevel.checkpoint()
            try:
                while True:
                    await self._stream.send_all(self._queued.receive_nowait())
            except (trio.WouldBlock, AsrfsError):
                return
