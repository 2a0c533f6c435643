"""Books: what people decided about a vault, so that a rebuilt catalog has it again: its policies, its groups.

Like a machine's description, a whole book is an object of the vault, sealed with the master key; the one with the
highest generation is valid. Older ones go once the newer is committed, but for a few. A change that died between object
and commit was asked for, and a rebuild may find it; the next change is newer still.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from asrfs.errors import AsrfsError, IntegrityError
from replica_store.vault.keys import Sealer
from replica_store.vault.objects import ObjectMissingError, Objects

BOOKS_KEPT = 3


class Book(Protocol):
    """`generation` rises with each change."""

    @property
    def generation(self) -> int: ...


B = TypeVar("B", bound=Book)


@dataclass(frozen=True)
class Shelf(Generic[B]):
    """Where the books of one kind are. `seal`: what their seal is bound to; `what`: they hold, for people."""

    prefix: str
    seal: bytes
    what: str
    kind: type[B]
    is_sound: Callable[[B], bool]

    def put(self, objects: Objects, sealer: Sealer, book: B) -> None:
        """Durable when it returns. Raises OSError."""
        assert self.is_sound(book)
        sealed = sealer.seal_book(self.seal, msgspec.msgpack.encode(book))
        objects.put(f"{self.prefix}{secrets.token_hex(8)}.obj", [sealed])

    def newest(self, objects: Objects, sealer: Sealer) -> tuple[B | None, list[str]]:
        """The valid one among the vault's objects, and a line for each that cannot be read."""
        books, damages = self._books(objects, sealer)
        return max(books.values(), key=lambda book: book.generation, default=None), damages

    def of_generation(self, objects: Objects, sealer: Sealer, generation: int) -> B | None:
        """The one of this generation, if it is still kept."""
        books, _ = self._books(objects, sealer)
        return next((book for book in books.values() if book.generation == generation), None)

    def remove_old(self, objects: Objects, sealer: Sealer) -> None:
        """What is left for another time does no harm."""
        try:
            books, _ = self._books(objects, sealer)
            for name in sorted(books, key=lambda name: books[name].generation)[:-BOOKS_KEPT]:
                objects.delete(name)
        except AsrfsError:
            return

    def _books(self, objects: Objects, sealer: Sealer) -> tuple[dict[str, B], list[str]]:
        books = {}
        damages = []
        for name in objects.list(self.prefix):
            where = objects.where(name)
            try:
                books[name] = self._decode(sealer.open_book(self.seal, objects.read(name), where), where)
            except ObjectMissingError:
                continue
            except IntegrityError as error:
                damages.append(str(error))
        return books, damages

    def _decode(self, raw: bytes, where: str) -> B:
        try:
            book = msgspec.msgpack.decode(raw, type=self.kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise IntegrityError(f"{where}: the {self.what} cannot be read: {error}") from None
        if not self.is_sound(book):
            raise IntegrityError(f"{where}: holds {self.what} that cannot be")
        return book
