"""Pattern: which weights may be non-zero."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import PatternError

MAX_GROUP = 32
MAX_ROWS = 999

_TEXT = re.compile(r"(?P<keep>\d{1,3}):(?P<group>\d{1,3})(?:x(?P<rows>\d{1,3})|(?P<transposable>t))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Pattern:
    """At most `keep` non-zero weights in every `group` neighbours along the input axis.

    Groups start at index 0 of the input axis: `in_features` of a Linear, input channels of a convolution.

    Args:
        keep: weights that survive in each group, 1 <= keep < group.
        group: neighbours that make one group, 2 ... 32.
        rows: output rows that share one mask ("2:4x4" has rows=4), 1 ... 999; 1 when every row has its own.
        transposable: the mask holds the pattern along both axes ("2:4t").
    Raises:
        PatternError: numbers outside those ranges, or `rows` together with `transposable`.

    >>> Pattern.parse("2:4")
    Pattern(keep=2, group=4, rows=1, transposable=False)
    >>> str(Pattern(keep=2, group=4, rows=4)), Pattern.parse("1:4").density
    ('2:4x4', 0.25)
    """

    keep: int = 2
    group: int = 4
    rows: int = 1
    transposable: bool = False

    def __post_init__(self) -> None:
        for name in ("keep", "group", "rows"):
            number = getattr(self, name)
            if type(number) is not int:
                raise PatternError(
                    f"{name}={number!r} in a Pattern: it must be an int, for instance Pattern.parse('2:4')."
                )
        if not 2 <= self.group <= MAX_GROUP:
            raise PatternError(f"group={self.group} in a Pattern: a group has 2 to {MAX_GROUP} weights.")
        if not 1 <= self.keep < self.group:
            raise PatternError(
                f"keep={self.keep} of group={self.group}: a pattern keeps at least 1 and at most group-1 weights."
                " '2:4' means keep 2 of 4."
            )
        if not 1 <= self.rows <= MAX_ROWS:
            raise PatternError(f"rows={self.rows} in a Pattern: 1 to {MAX_ROWS} rows share a mask.")
        if self.transposable and self.rows != 1:
            raise PatternError("a pattern is either transposable ('2:4t') or shared by rows ('2:4x4'), not both.")

    @staticmethod
    def parse(text: Pattern | str) -> Pattern:
        """The Pattern that a text such as "2:4", "1:4", "4:8", "2:4x4" or "2:4t" names; a Pattern is returned as it is.

        Raises:
            PatternError: anything else.
        """
        if isinstance(text, Pattern):
            return text
        match = _TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise PatternError(
                f"unknown pattern {text!r}: write KEEP:GROUP, as in '2:4' (keep 2 of 4), '1:4' or '4:8';"
                " '2:4x4' lets 4 output rows share a mask, '2:4t' holds along both axes."
            )
        return Pattern(
            keep=int(match["keep"]),
            group=int(match["group"]),
            rows=int(match["rows"] or 1),
            transposable=match["transposable"] is not None,
        )

    @property
    def density(self) -> float:
        """Share of the weights that survive: keep / group."""
        return self.keep / self.group

    def __str__(self) -> str:
        suffix = "t" if self.transposable else f"x{self.rows}" if self.rows > 1 else ""
        return f"{self.keep}:{self.group}{suffix}"
