"""Fixed blocks of a tensor: sums, random numbers and digests are per block, so that slabs change nothing."""

from __future__ import annotations

BLOCK = 1 << 15
"""Elements of a block; slabs are whole blocks."""
