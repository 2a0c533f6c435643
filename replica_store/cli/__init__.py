"""The program `replica-store`: one file a verb; parsing, rendering, exit codes."""
