"""A causal language model as an object: loaded, looked at, saved."""
