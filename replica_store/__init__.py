"""The replica store, at the other end of the line; see README.md beside this file for its rooms."""

from asrfs import __version__

__all__ = ["__version__"]
