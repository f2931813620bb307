"""LoRAs of another rank."""
