"""The command `hylora`."""
