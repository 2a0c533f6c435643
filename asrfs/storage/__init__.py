"""Files and directories: the only room with file descriptors. What a crash may do to each call is written down here."""
