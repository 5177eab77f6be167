"""The name that somebody may have meant, for errors about names that do not exist."""

import difflib
from collections.abc import Iterable


def nearest_name(name: object, known: Iterable[str]) -> str | None:
    """The known name that looks most like a given one, whatever its case; None where none does."""
    by_lower_case: dict[str, str] = {}
    for entry in known:
        by_lower_case.setdefault(entry.lower(), entry)
    near = difflib.get_close_matches(str(name).lower(), by_lower_case, n=1)
    return by_lower_case[near[0]] if near else None


def perhaps(name: object, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a name: ``"; perhaps resnet"``, or nothing where no known name is near."""
    near = nearest_name(name, known)
    return f"; perhaps {near}" if near else ""
