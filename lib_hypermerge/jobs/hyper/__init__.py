"""Hyper-Merge: several checkpoints become one hyper-model, a few shared LoRAs, and multipliers."""
