"""The levels, one module each; `registry` names them all."""
