"""Boot settings as both programs show them."""

from __future__ import annotations

from typing import Any

import msgspec

from asrfs.model.boot import BootSettings


def boot_document(settings: BootSettings) -> dict[str, Any]:
    """In JSON's types; what is at its default is not there."""
    document: dict[str, Any] = msgspec.to_builtins(settings)
    return document


def boot_rows(document: dict[str, Any]) -> dict[str, Any]:
    """For people: one row a value, named by its place."""
    rows: dict[str, Any] = {}

    def enter(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                enter(f"{name}.{key}" if name else key, each)
        elif isinstance(value, list | tuple) and any(isinstance(each, dict) for each in value):
            for number, each in enumerate(value):
                enter(f"{name}.{number}", each)
        elif isinstance(value, list | tuple):
            rows[name] = ", ".join(" ".join(each) if isinstance(each, list | tuple) else str(each) for each in value)
        else:
            rows[name] = value

    enter("", document)
    return rows
