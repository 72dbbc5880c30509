"""Latency: estimated for a target that is not here (estimate.py), measured here (measure.py)."""
