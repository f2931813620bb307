"""How adapter files spell the layers of a network."""
