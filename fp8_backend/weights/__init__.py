"""Checkpoints and packed weight layouts."""
