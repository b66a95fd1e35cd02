"""Values of options that several commands refuse alike."""

from collections.abc import Collection
from difflib import get_close_matches

from mslt.errors import MsltError


def refuse_unknown(option: str, name: str, known: Collection[str]) -> None:
    """MsltError that lists what there is, and the nearest."""
    if name in known:
        return
    lower = {each.lower(): each for each in known}
    near = get_close_matches(name.lower(), list(lower), 1)
    meant = f"; did you mean {lower[near[0]]}?" if near else ""
    raise MsltError(f"{option} {name}: there are {', '.join(known)}{meant}")


def refuse_rate(option: str, rate: float, like: str) -> None:
    """MsltError for what is no learning rate."""
    if not 0 < rate < 1:
        raise MsltError(f"{option} {rate}: must be above 0 and below 1, like {like}")
