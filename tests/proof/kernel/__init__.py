"""What the kernel levels share: the installed programs under strace, under planted bugs, and the loads above them."""
