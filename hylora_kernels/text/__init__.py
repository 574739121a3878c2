"""Text: its sources, and its tokens in blocks."""
