"""Families of adapters: the tensors of one module in a file ↔ the change of a weight."""
