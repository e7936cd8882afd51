"""Hypha: a peer-to-peer, lease-based network that trains one model on scattered machines."""

__version__ = "0.1.0"
