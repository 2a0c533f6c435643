"""Composition: supervisor, disk server and agent are built and joined here; only this room reads configuration."""
