"""What people should know about, while it lasts. An alarm has an id; raising it again replaces its text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    def hold(self, id: str, alarms: Sequence[Alarm]) -> None:
        """Have exactly these of an id, one or none."""
        for alarm in alarms:
            self.set(*alarm)
        if not alarms:
            self.clear(id)

    def clear(self, *ids: str) -> None:
        for id in ids:
            if self._alarms.pop(id, None) is not None:
                self._log.info("alarm over", id=id)

    def now(self) -> list[Alarm]:
        """See `in_order`."""
        return in_order(self._alarms.values())

    def __contains__(self, id: str) -> bool:
        return id in self._alarms


def in_order(alarms: Iterable[Alarm]) -> list[Alarm]:
    """One alarm of each id, the first of it; critical ones first, then by id."""
    one_each: dict[str, Alarm] = {}
    for alarm in alarms:
        one_each.setdefault(alarm.id, alarm)
    return sorted(one_each.values(), key=lambda alarm: (alarm.severity != "critical", alarm.id))
