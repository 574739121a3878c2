"""Parts that several backends use."""
