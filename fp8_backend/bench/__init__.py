"""`fp8-backend bench`: dense linears beside every peer and the time of streaming their weights."""
