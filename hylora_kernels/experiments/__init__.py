"""Runs over many models: a sweep and the demo."""
