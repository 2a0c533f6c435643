"""PURE: what a store says of a machine that goes on elsewhere, to the store that is to protect it from then on.

It travels with the machine's enrolment (`replica-store reprotect`), so it is checked where it arrives. Of the policy it
has the texts a person wrote; what they mean is `model/policy.py`'s.
"""

from __future__ import annotations

import msgspec

from asrfs.errors import BadInputError
from asrfs.model.configuration import KEY_CHARACTERS_MAX, KEYS_MAX, TEXT_CHARACTERS_MAX
from asrfs.model.names import is_id, is_name

ARRIVAL_BYTES_MAX = 48 << 10


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """`store_id`: of the store that says it. `away`: the machine runs where it was failed over to, not at home.

    `policy` and `keys`: what held for it, and holds further; `owner`: id of the store where a person decided that.
    """

    store_id: str
    away: bool
    owner: str
    policy: str
    keys: dict[str, str] = {}


def check_arrival(arrival: Arrival) -> Arrival:
    """Raises BadInputError for what no store says."""
    is_sound = (
        is_id(arrival.store_id)
        and is_id(arrival.owner)
        and is_name(arrival.policy)
        and len(arrival.keys) <= KEYS_MAX
        and all(len(key) <= KEY_CHARACTERS_MAX and key.isprintable() for key in arrival.keys)
        and all(len(text) <= TEXT_CHARACTERS_MAX and text.isprintable() for text in arrival.keys.values())
    )
    if not is_sound:
        raise BadInputError("what the store of before says of this machine cannot be: begin again with `reprotect`")
    return arrival


def decode_arrival(content: bytes, where: str) -> Arrival:
    """Raises BadInputError."""
    try:
        arrival = msgspec.json.decode(content, type=Arrival)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadInputError(f"{where} cannot be read: {error}") from None
    return check_arrival(arrival)
