"""How a valid input becomes a hostile one. Each kind is a fault of the level and has to strike in every run.

Bytes are flipped, cut, lengthened, spliced, overwritten with extreme integers; fields of a structure are replaced and
the structure encoded anew, so that its checksum is right again; documents get values of other types; texts get what
parsers trip over. A function of the randomness it is given, and of nothing else.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

Strike = Callable[[str], None]
"""Told the name of each fault that struck."""

BYTE_KINDS = ("flip", "truncate", "extend", "splice", "overwrite", "repeat", "remove", "junk")
KINDS = (*BYTE_KINDS, "field", "value", "text", "bomb")
"""`field`: with the checksum made right again. `value`: in a document."""

EXTREMES = tuple(
    sorted(
        {
            near + step
            for near in (0, *(1 << bits for bits in (7, 8, 15, 16, 20, 26, 31, 32, 38, 40, 47, 53, 62, 63, 64)))
            for step in (-1, 0, 1)
        }
    )
)
_NASTY = (
    *("", " ", "\0", "\n", "\r\nx: y", "/", "..", "../", "a/../../b", ".", "-", "%", ":", "\x1b[31m", "\u202e", "é"),
    *("٣", "²", "１", "\ud800", "😀", "nan", "inf", "1e999", "-1", "0x10", "1_0", "+1", "9" * 30, "9" * 5000),
    *("A" * 64, "A" * 5000, "'", '"', "\\", "[bold]", "{0}", "$(id)", "; rm", "con", "true", "null"),
)
_DEEP = 3000


def flip(rng: random.Random, content: bytes) -> bytes:
    """One to four bits, so never the same bytes."""
    changed = bytearray(content)
    for at in rng.sample(range(len(content) * 8), min(len(content) * 8, rng.randint(1, 4))):
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def mutate_bytes(rng: random.Random, content: bytes, other: bytes, strike: Strike) -> bytes:
    """`content` broken in one way; `other` is a second valid input, for splicing."""
    kind = rng.choice(BYTE_KINDS)
    strike(kind)
    size = len(content)
    at = rng.randrange(size + 1)
    if kind == "flip":
        return flip(rng, content)
    if kind == "truncate":
        return content[:at]
    if kind == "extend":
        more = rng.choice((content, other, rng.randbytes(rng.randint(1, 300)), bytes(rng.randint(1, 300))))
        return content + more
    if kind == "splice":
        return content[:at] + other[rng.randrange(len(other) + 1) :]
    if kind == "overwrite":
        width = rng.choice((1, 2, 4, 8))
        number = extreme(rng, width * 8).to_bytes(width, rng.choice(("little", "big")))
        return content[:at] + number + content[at + width :]
    end = min(size, at + rng.randint(1, 64))
    if kind == "repeat":
        return content[:end] + content[at:end] * rng.randint(1, 8) + content[end:]
    if kind == "remove":
        return content[:at] + content[end:]
    return rng.randbytes(min(size, rng.choice((0, 1, 16, 100, 4096))))


def extreme(rng: random.Random, bits: int) -> int:
    """A number at the edge of something that fits into so many bits without a sign, or any that does."""
    if rng.random() < 0.2:
        return rng.getrandbits(bits)
    return rng.choice(EXTREMES) & ((1 << bits) - 1)


def any_extreme(rng: random.Random) -> int:
    """Negative and oversized ones too."""
    number = rng.choice(EXTREMES)
    return -number if rng.random() < 0.3 else number


def mutate_fields(rng: random.Random, fields: Sequence[Any], bits: Sequence[int]) -> list[Any]:
    """One or two fields replaced; `bits` of each: its width as a number, or 8 times the length of its bytes."""
    changed = list(fields)
    for at in rng.sample(range(len(changed)), rng.choice((1, 1, 2))):
        old = changed[at]
        changed[at] = flip(rng, old) if isinstance(old, bytes) else _other_number(rng, old, bits[at])
    return changed


def _other_number(rng: random.Random, number: int, bits: int) -> int:
    near = number + rng.choice((-1, 1, -512, 512))
    return near & ((1 << bits) - 1) if rng.random() < 0.4 else extreme(rng, bits)


# ---- documents and texts ------------------------------------------------------------------------------------------


def mutate_text(rng: random.Random, text: str, strike: Strike) -> str:
    strike("text")
    at = rng.randrange(len(text) + 1)
    end = rng.randrange(at, min(len(text), at + 8) + 1)
    return text[:at] + rng.choice(_NASTY) + text[end:] if rng.random() < 0.9 else rng.choice(_NASTY) * 3


def mutate_document(rng: random.Random, document: Any, strike: Strike) -> Any:
    """A copy of a document of dicts, lists and scalars with one to three of its values changed, lost or added."""
    strike("value")
    copy = (
        json.loads(json.dumps(document))
        if not _has_bytes(document)
        else msgspec.msgpack.decode(msgspec.msgpack.encode(document))
    )
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        copy = _mutate_once(rng, copy)
    return copy


def _mutate_once(rng: random.Random, document: Any) -> Any:
    if isinstance(document, dict) and document:
        key = rng.choice(list(document))
        chance = rng.random()
        if chance < 0.1:
            del document[key]
        elif chance < 0.2:
            document[_odd_text(rng)] = odd_value(rng)
        else:
            document[key] = _mutate_once(rng, document[key])
        return document
    if isinstance(document, list) and document and rng.random() < 0.8:
        at = rng.randrange(len(document))
        chance = rng.random()
        if chance < 0.15:
            del document[at]
        elif chance < 0.3:
            document.append(document[at])
        else:
            document[at] = _mutate_once(rng, document[at])
        return document
    if isinstance(document, str) and rng.random() < 0.7:
        return mutate_text(rng, document, lambda kind: None)
    if isinstance(document, bytes) and document and rng.random() < 0.7:
        return rng.choice((flip(rng, document), document[:-1], document + b"\0", b""))
    if isinstance(document, int) and not isinstance(document, bool) and rng.random() < 0.8:
        return rng.choice((any_extreme(rng), document + 1, document - 1, -document))
    return odd_value(rng)


def odd_value(rng: random.Random) -> Any:
    """A value of any type."""
    return rng.choice(
        (
            *(None, True, False, [], {}, {"a": {}}, [[1], {"b": None}], 0.5, -0.0, math.inf, math.nan, 1e300),
            *(any_extreme(rng), _odd_text(rng), _odd_text(rng)),
        )
    )


def _odd_text(rng: random.Random) -> str:
    return rng.choice(_NASTY)


def _has_bytes(document: Any) -> bool:
    if isinstance(document, dict):
        return any(_has_bytes(value) for value in document.values())
    return isinstance(document, bytes) or (isinstance(document, list) and any(map(_has_bytes, document)))


def as_json(rng: random.Random, document: Any) -> bytes:
    """What a hostile program would write: NaN, numbers of any length, lone surrogates, or nested without end."""
    if rng.random() < 0.01:
        return rng.choice((b"[", b'{"a":', b'{"name":[')) * _DEEP
    return json.dumps(document, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def as_msgpack(rng: random.Random, document: Any) -> bytes:
    """The same for MessagePack; numbers that it cannot hold are cut to 64 bits."""
    if rng.random() < 0.01:
        return rng.choice((b"\x91", b"\x81\xa1a")) * _DEEP
    return msgspec.msgpack.encode(_fitting(document))


def _fitting(document: Any) -> Any:
    if isinstance(document, dict):
        return {_fitting(key): _fitting(value) for key, value in document.items()}
    if isinstance(document, list):
        return [_fitting(value) for value in document]
    if isinstance(document, str):
        return document.encode("utf-8", "replace").decode()
    if isinstance(document, int) and not isinstance(document, bool):
        return document if -(1 << 63) <= document < 1 << 64 else document & ((1 << 64) - 1)
    return document
