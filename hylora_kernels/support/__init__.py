"""Files, devices, hashes, reports, tables and pictures. Imports nothing else of the package."""
