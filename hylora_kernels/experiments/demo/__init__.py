"""The demo: the whole method on a real model, with a page to look at."""
