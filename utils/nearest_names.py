"""The name that somebody may have meant, for errors about names that do not exist."""

import difflib
from collections.abc import Iterable


def perhaps(name: object, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a name: ``"; perhaps resnet"``, or nothing where no known name is near."""
    by_lower_case = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower_case, n=1)
    return f"; perhaps {by_lower_case[near[0]]}" if near else ""
