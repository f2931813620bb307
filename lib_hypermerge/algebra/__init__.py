"""Tensors in, tensors out: no files, no names, no interface."""
