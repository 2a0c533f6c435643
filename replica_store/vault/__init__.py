"""Immutable log objects, the catalog (the only SQL), keys, scrub and rebuild."""
