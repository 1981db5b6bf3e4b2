"""What the licences of a merge's parents mean for the merge. Nothing is invented: what is not declared stays so."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NON_COMMERCIAL = re.compile(r"(^|[-_])(nc|non-?commercial|research)($|[-_])")
_NO_DERIVATIVES = re.compile(r"^cc-by-(nc-)?nd(-|$)")
_ALIKE = re.compile(r"^(a?gpl|lgpl|cc-by-(nc-)?sa|osl|eupl|mpl)(-|$)")
_OWN_TERMS = re.compile(r"^(llama|gemma|qwen|deepseek|falcon|mnpl|h-research|tongyi|stabilityai|other$|unknown$)")


def common_licence(licences: Mapping[str, str | None]) -> str | None:
    """Give the licence that all parents declare; None where one declares none, or another.

    >>> common_licence({"base": "mit", "a": "MIT"}), common_licence({"base": "mit", "a": None})
    ('mit', None)
    """
    found = {licence.lower() if licence else None for licence in licences.values()}
    return found.pop() if len(found) == 1 else None


def licence_facts(licences: Mapping[str, str | None]) -> dict[str, Any]:
    """Give the licence fields of a card's metadata: one where all share it, `other` with a pointer, or none at all."""
    shared = common_licence(licences)
    if shared is not None:
        return {"license": shared}
    if not any(licences.values()):
        return {}
    return {"license": "other", "license_name": "licences-of-the-parents", "license_link": "README.md"}


def licence_warnings(licences: Mapping[str, str | None]) -> Iterator[str]:
    """Say where parents' licences are missing, forbid something, or may not go together."""
    declared = {name: licence.lower() for name, licence in licences.items() if licence}
    if missing := [name for name in licences if name not in declared]:
        yield f"no licence is declared by {', '.join(missing)}: ask before you publish the merge"
    for name, licence in declared.items():
        if _NO_DERIVATIVES.search(licence):
            yield f"{name} is under {licence}, which forbids to pass on what is made from it; a merge is"
        elif _NON_COMMERCIAL.search(licence):
            yield f"{name} is under {licence}, not for commercial use; neither is the merge"
    binding = sorted({licence for licence in declared.values() if _ALIKE.search(licence) or _OWN_TERMS.search(licence)})
    others = sorted(set(declared.values()) - set(binding))
    if len(binding) > 1 or (binding and others):
        names = ", ".join([*binding, *others])
        yield f"licences with terms for what is made from them, beside others: {names}; read them"
