"""PURE: names, sizes, extents, the machine and its disks, positions, the clock's interface. No I/O, no time."""
