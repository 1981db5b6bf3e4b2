"""Whose tokens the output has, and where each source has its rows of them."""
