"""One tree of errors for host and store.

Each class says two things and nothing else decides on them: the exit code a command ends with (CLI contract) and
whether trying the same again can help. `assert` is for our own bugs; these are for the world's.
"""

from __future__ import annotations

FOREIGN_CHARACTERS_MAX = 500


def foreign_line(text: str) -> str:
    """What another machine said, as part of a line of ours: bounded, printable, without line breaks."""
    line = " ".join(text[: 4 * FOREIGN_CHARACTERS_MAX].split())[:FOREIGN_CHARACTERS_MAX]
    return "".join(character if character.isprintable() else "?" for character in line)


class AsrfsError(Exception):
    """Something failed. The text is one line: what happened, to which thing, what to do."""

    exit_code: int = 1
    retryable: bool = False


class TemporaryError(AsrfsError):
    """The same request may succeed later: link, store or process away, time ran out."""

    retryable = True


class NoSpaceError(TemporaryError):
    """A filesystem below us is full. Nothing acknowledged is lost; goes on when space returns."""


class BadInputError(AsrfsError):
    """Wrong usage or a value outside what is allowed."""

    exit_code = 2


class NotFoundError(AsrfsError):
    """No such disk, machine, point or file."""

    exit_code = 3


class RefusedError(AsrfsError):
    """Understood, but not allowed in the present state."""

    exit_code = 4


class FencedError(RefusedError):
    """A superseded epoch tried to add to a history (I6)."""


class IntegrityError(AsrfsError):
    """Bytes are not what they were: a checksum, a digest or an order is broken. Names file, offset and LSN."""

    exit_code = 5


class FormatError(IntegrityError):
    """Bytes that do not follow FORMAT.md."""


class AuthenticationError(AsrfsError):
    """A token, certificate or peer was refused."""

    exit_code = 6


def error_class(exit_code: object) -> type[AsrfsError]:
    """The class of error that another process or machine of ours ended or answered with."""
    return _BY_EXIT_CODE.get(exit_code, TemporaryError) if isinstance(exit_code, int) else TemporaryError


_BY_EXIT_CODE: dict[int, type[AsrfsError]] = {
    1: TemporaryError,
    2: BadInputError,
    3: NotFoundError,
    4: RefusedError,
    5: IntegrityError,
    6: AuthenticationError,
}
