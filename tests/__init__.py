"""The tests, in layers: the lowest red layer is the cause. CONTRIBUTING.md says which test belongs where."""
