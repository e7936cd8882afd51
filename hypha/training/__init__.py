"""Executors: the only processes that load torch, and that never load trio (rounds.md)."""
