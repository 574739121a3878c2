"""Other libraries that work with this package's models, one file each: docs/integrations.md."""
