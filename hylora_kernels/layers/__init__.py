"""The modules that a model is made of."""
