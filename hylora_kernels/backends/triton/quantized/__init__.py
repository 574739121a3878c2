"""Quantised matrices on a GPU: config.py chooses tiles, kernels.py has the kernels, launch.py their
arguments and ops, packed.py the layer packed for inference.

A matrix is read in its bit planes where x has few rows; for many rows it is dequantised into memory
that the next matrix takes again, and torch's own product multiplies. No GPU has run any of it yet.
"""
