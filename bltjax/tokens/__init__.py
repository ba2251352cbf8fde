"""The token model from Python: what byte models are measured against."""
