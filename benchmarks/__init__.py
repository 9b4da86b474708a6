"""Measurements: each writes a result file that names the run it came from."""
