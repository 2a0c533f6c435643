"""Doubles that more than one layer uses; each passes the contract suite of what it stands for."""
