"""The hooks around one point: pre hooks in order, post hooks in reverse order, those in any case.

begin: pre or hold, by order ─▶ first failure ends it      end: post or let go, by order backwards, every one of them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from asrfs.consistency.hook_run import RunningHook, clean_environment, failure_of, not_started, run_hook
from asrfs.consistency.hooks import Hook, after, before
from asrfs.errors import RefusedError
from asrfs.model.clock import Clock
from asrfs.model.marker import HookResult


class HookSequence:
    """`facts` is told to every hook, see `clean_environment`."""

    def __init__(
        self,
        hooks: Sequence[Hook],
        facts: Mapping[str, str],
        clock: Clock,
    ) -> None:
        self._hooks = hooks
        self._facts = facts
        self._clock = clock
        self._holding: dict[str, RunningHook] = {}
        self.results: list[HookResult] = []
        self.lost: str | None = None
        """Which hook found, when it let go, that it had not held until then."""

    def begin(self) -> str | None:
        """None when all is quiet, else why not; then nothing more was begun."""
        for hook in before(self._hooks):
            result = self._hold(hook) if hook.phase == "hold" else self._run(hook, {"PHASE": "pre"})
            self.results.append(result)
            if failed := failure_of(result):
                return failed
        return None

    @property
    def is_quieting(self) -> bool:
        """Whether any of them does something before the instant."""
        return bool(before(self._hooks))

    def still_holding(self) -> str | None:
        """None, or which hook has let go by itself."""
        for name, running in self._holding.items():
            if not running.is_running:
                return f"hook {name}: it let go too early"
        return None

    def end(self, failed: str | None) -> list[str]:
        """Let go and run all post hooks; what failed in that."""
        failures = []
        for hook in after(self._hooks):
            if hook.phase == "post":
                result = self._run(hook, {"PHASE": "post", "FAILED": failed or ""})
            elif hook.name in self._holding:
                running = self._holding.pop(hook.name)
                running.let_go()
                result = running.finish()
                self.lost = self.lost or failure_of(result)
            else:
                continue
            self.results.append(result)
            if failure := failure_of(result):
                failures.append(failure)
        return failures

    def _run(self, hook: Hook, more: Mapping[str, str]) -> HookResult:
        environment = clean_environment({**self._facts, **more})
        return run_hook(hook, "post" if more["PHASE"] == "post" else "pre", environment, self._clock)

    def _hold(self, hook: Hook) -> HookResult:
        try:
            running = RunningHook(hook, "pre", clean_environment({**self._facts, "PHASE": "hold"}), self._clock)
        except (RefusedError, OSError) as error:
            return not_started(hook, "pre", error)
        said = running.wait_for_line()
        if said is not None:
            self._holding[hook.name] = running
            return said
        result = running.finish()
        if result.exit_code == 0:
            return msgspec.structs.replace(result, exit_code=None, happened="ended before it held anything")
        return result
