"""Which tensor of a checkpoint is which layer, and what a LoRA file calls it."""
