"""A point as somebody wants it: what a command and a policy ask for, before anything is made."""

from __future__ import annotations

from typing import Any

import msgspec

from asrfs.errors import AsrfsError, BadInputError
from asrfs.model.marker import CONSISTENCIES, NOTE_CHARACTERS_MAX, Consistency, is_line
from asrfs.model.names import check_point_name
from asrfs.model.policy import OnFailure


class PointRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A point that somebody wants. `on_failure`: what to do if it cannot have the consistency that is asked for."""

    consistency: Consistency = "crash"
    name: str | None = None
    note: str | None = None
    on_failure: OnFailure = "crash"

    def check(self) -> None:
        """Raise BadInputError."""
        if self.name is not None:
            check_point_name(self.name)
        if not is_line(self.note, NOTE_CHARACTERS_MAX):
            raise BadInputError(f"a note is one line of at most {NOTE_CHARACTERS_MAX} characters")


def request_of(fields: dict[str, Any]) -> PointRequest:
    """What a command asks for. Raises BadInputError."""
    chosen = {key: fields[key] for key in ("consistency", "name", "note", "on_failure") if fields.get(key) is not None}
    try:
        return msgspec.convert(chosen, PointRequest)
    except (msgspec.MsgspecError, AsrfsError) as error:
        raise BadInputError(
            f"no such point can be made: {error}; consistency is one of {', '.join(CONSISTENCIES)}"
        ) from None
