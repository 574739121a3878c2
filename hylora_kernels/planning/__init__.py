"""What a compression will need, before anything is loaded."""
