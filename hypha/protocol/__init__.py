"""The rules of the network as plain values and functions: no clock, no socket, no chance, no disk."""
