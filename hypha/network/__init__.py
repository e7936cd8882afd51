"""How messages and tensors reach other nodes: one seam (`seam.Network`), a libp2p and an in-memory implementation."""
