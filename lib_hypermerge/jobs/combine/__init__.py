"""Several LoRAs with weights as one LoRA."""
