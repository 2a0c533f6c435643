"""How both programs meet a person or a script: the command line's frame, exit codes, tables, JSON, progress."""
