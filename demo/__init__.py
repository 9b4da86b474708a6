"""`make demo`: a generated FP8 checkpoint served by vLLM through fp8_backend."""
