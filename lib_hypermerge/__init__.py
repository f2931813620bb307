"""Hypermerge: LoRAs out of checkpoints, checkpoints out of LoRAs, and many checkpoints in one."""

__version__ = "0.1.0"
