"""`fp8-backend ab`: the same vLLM twice, with its default backend and with this one."""
