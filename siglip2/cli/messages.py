"""What a parser's error says, without what only its author would read."""

import re

UNION = "Does not validate against any of the Union subtypes"
SCAFFOLD = re.compile(
    rf"{UNION}|Subtypes: |Errors:$|Given value|- Expected a <class 'NoneType'>|"
    r"- Problem with given class_path '[^']+':$"
)
KEY = re.compile(r'-? ?Parser key "([^"]+)":')


def essence(message: str) -> str:
    """Returns the reasons out of a message about a value that fits none of several types; other messages as they are.

    An option that may also be absent is such a value for the parser: what is wrong with it stands between a list of
    types and a complaint that it is not None, once more inside for each option within it. What is left is where it is
    and what is wrong there.
    """
    if UNION not in message:
        return message
    keys, reasons = [], []
    for line in (line.strip() for line in message.splitlines()):
        if key := KEY.match(line):
            keys.append(key[1])
            line = line[key.end() :].strip()
        if line and not SCAFFOLD.match(line):
            reasons.append(line.removeprefix("- "))
    if not reasons:
        return message
    place = f'Parser key "{".".join(keys)}": ' if keys else ""
    return place + "; ".join(dict.fromkeys(reasons))
