"""Compression: calibrate, whiten, allocate ranks, factorize, refit, replace."""
