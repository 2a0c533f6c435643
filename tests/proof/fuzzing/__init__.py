"""What the level `fuzz` feeds to the product: how inputs are broken, and the places they are fed to."""
