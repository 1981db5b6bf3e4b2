"""Rows of different mixtures, answered together: requests in, events out. Knows nothing of HTTP."""
