"""Composition of the store: only this room reads configuration and builds objects."""
