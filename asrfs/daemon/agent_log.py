"""The agent's log: JSON lines in `STATE/log/agent.log`, from structlog and from the standard library alike.

Rotation and stderr are those of every daemon (`logs.py`). No secret, no payload and no single request is logged.
"""

from __future__ import annotations

import logging

import structlog

from asrfs.daemon.logs import start_logging
from asrfs.daemon.state import StateDirectory


def start_agent_log(state: StateDirectory) -> None:
    """From here on everything that is logged goes to the file."""
    start_logging(state, "agent", owns_stderr=True)
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
