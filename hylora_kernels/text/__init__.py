"""Text as blocks of tokens, and where it comes from."""
