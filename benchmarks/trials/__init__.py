"""Kernels on trial: measured beside the one in use, moved into the package where they win, deleted where they lose."""
