"""Packing a model for inference, and generating text."""
