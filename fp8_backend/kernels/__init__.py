"""Kernels: reference, problem to config, compile, cache, launch."""
