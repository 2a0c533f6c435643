"""Proofs: levels that break the product on purpose, in many cases, from one seed. `tools/prove` runs them."""
