"""A finished bundle with one expert more or less."""
