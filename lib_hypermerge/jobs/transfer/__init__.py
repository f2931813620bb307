"""Transfer: LoRAs of one base checkpoint for another, related one."""
