"""PURE: every byte layout that leaves memory. FORMAT.md beside this file is its specification."""
