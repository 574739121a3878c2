"""Files, devices, reports: what knows nothing of models."""
