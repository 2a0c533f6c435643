"""Reading a point: from log objects to a disk, an export, a tree."""
