"""This computer: what it has, what is fastest on it, whether its results are right."""
