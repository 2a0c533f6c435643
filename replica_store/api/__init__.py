"""The management side of the store: HTTP API and enrolment."""
