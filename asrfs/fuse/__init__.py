"""The only room that knows the FUSE protocol: the direct session for disks, the tree session for points."""
