"""Perplexity, size and speed."""
