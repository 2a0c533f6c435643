"""From the journal to the image and to the store: applier, shipper, filler. No sockets, no configuration."""
