"""What people should know about, while it lasts. An alarm has an id; raising it again replaces its text."""

from __future__ import annotations

from typing import Literal, NamedTuple

import structlog

Severity = Literal["warning", "critical"]


class Alarm(NamedTuple):
    id: str
    severity: Severity
    text: str


class Alarms:
    """Alarms that hold now. Raising and clearing are logged once each."""

    def __init__(self) -> None:
        self._alarms: dict[str, Alarm] = {}
        self._log = structlog.get_logger("asrfs.alarms")

    def set(self, id: str, severity: Severity, text: str) -> None:
        """Raise the alarm, or change its text."""
        alarm = Alarm(id, severity, text)
        known = self._alarms.get(id)
        self._alarms[id] = alarm
        if known is None or known.severity != severity:
            self._log.warning("alarm", id=id, severity=severity, text=text)

    def clear(self, *ids: str) -> None:
        for id in ids:
            if self._alarms.pop(id, None) is not None:
                self._log.info("alarm over", id=id)

    def now(self) -> list[Alarm]:
        """Critical ones first, then by id."""
        return sorted(self._alarms.values(), key=lambda alarm: (alarm.severity != "critical", alarm.id))

    def __contains__(self, id: str) -> bool:
        return id in self._alarms
