"""Training the adapters of a compressed model."""
