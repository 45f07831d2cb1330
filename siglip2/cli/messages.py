"""What a parser's error says, without what only its author would read."""

UNION = "Does not validate against any of the Union subtypes"


def essence(message: str) -> str:
    """Returns the reasons out of a message about a value that fits none of several types; other messages as they are.

    An option that may also be absent is such a value for the parser: what is wrong with it stands between a list of
    types and a complaint that it is not None.
    """
    head, found, rest = message.partition(UNION)
    reasons = [line.strip()[2:] for line in rest.splitlines() if line.startswith("  - ") and "NoneType" not in line]
    return head.rstrip(" :\n") + (": " if head.strip() else "") + "; ".join(reasons) if found and reasons else message
