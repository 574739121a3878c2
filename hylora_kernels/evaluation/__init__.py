"""Perplexity, true size and speed of a causal language model, dense or compressed."""
