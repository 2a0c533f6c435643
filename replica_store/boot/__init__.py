"""Starting a recovered machine as its boot settings say, and seeing that it runs."""
