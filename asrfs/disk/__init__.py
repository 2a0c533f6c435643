"""The block interface every kind of disk has, and the kinds that need no other room."""
