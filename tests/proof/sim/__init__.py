"""A world for the simulation: two hosts, a network and a store of real parts in one process, one seed, virtual time."""
