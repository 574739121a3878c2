"""Every backend against float64, and the same call repeated."""
