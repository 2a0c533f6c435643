"""A journaled disk is a row of bytes: random histories against a bytearray, restarts and power losses included."""

from __future__ import annotations

from hypothesis import settings

from tests.fakes.disk_machine import DiskAgainstBytes

TestDiskAgainstBytes = DiskAgainstBytes.TestCase
TestDiskAgainstBytes.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
