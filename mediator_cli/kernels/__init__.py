"""Loops over arrays, compiled: float formats, ranks, random numbers, sparse codes. No input or output."""
