"""What a terminal is told: parameters become flags, and what strangers wrote in files cannot steer it.

The library names parameters, `learning_rate`; here they become the flags of a command, `--learning_rate`.
"""

import re
import unicodedata
from collections.abc import Iterable


def with_dashes(text: str, names: Iterable[str], marked: Iterable[str] = ()) -> str:
    """`text` with two dashes before every option of `names` that it speaks of.

    A name of several words, joined by "_", is no ordinary word and is found wherever it stands alone; one of a single
    word only if it is `marked` as a parameter (see SVFitError).  Quoted words and parts of paths stay what they are.
    """
    meant = [name for name in names if "_" in name or name in set(marked)]
    if not meant:
        return text
    longest_first = "|".join(re.escape(name) for name in sorted(meant, key=len, reverse=True))
    return re.sub(rf"(?<![\w./\\'\"=-])({longest_first})(?![\w/\\'\"-]|\.\w)", r"--\1", text)


JOINERS = "\u200c\u200d"  # within words of some scripts and within emoji; they steer nothing


def printable(text: object, keep: str = "") -> str:
    """`text` with everything that moves a cursor, colours, or turns directions as "\\u001b", except characters in `keep`.

    So a header's words can neither act on a terminal nor forge a line of their own.  What is JSON stays so, if `keep`
    has the line feed.
    """
    return "".join(
        character
        if character in keep + JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Cs")
        else f"\\u{ord(character):04x}"
        for character in str(text)
    )
