"""The checksum that a manifest holds of its own text: SHA-256 of the text in which the checksum is empty."""

from __future__ import annotations

import hashlib


def fits_checksum(text: str, checksum: str) -> bool:
    """Tell whether a JSON text is, to the byte, that of the checksum in the first field of that name.

    >>> checksum = sha256('{"checksum": "", "seed": 0}')
    >>> fits_checksum(f'{{"checksum": "{checksum}", "seed": 0}}', checksum)
    True
    >>> fits_checksum(f'{{"checksum": "{checksum}", "seed": 1}}', checksum)
    False
    """
    return sha256(text.replace(f'"checksum": "{checksum}"', '"checksum": ""', 1)) == checksum


def sha256(text: str) -> str:
    """Digest a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
