"""Times and names as people read them."""

# Of one, of several, and seconds in it.
_UNITS = (
    ("year", "years", 365 * 86400),
    ("month", "months", 30 * 86400),
    ("week", "weeks", 7 * 86400),
    ("day", "days", 86400),
    ("hour", "hours", 3600),
    ("min", "min", 60),
    ("s", "s", 1),
)
_JUST_NOW = 5


def age_in_words(seconds: float) -> str:
    """One number and its unit, rounded down: `3 hours`; `just now` for what is to come, too."""
    if seconds < _JUST_NOW:
        return "just now"
    one, several, length = next(unit for unit in _UNITS if seconds >= unit[2])
    count = int(seconds // length)
    return f"{count} {one if count == 1 else several}"


def duration(seconds: float) -> str:
    """Two units at most: `2 h 05 min`, `3 min 09 s`, `12 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def printable(text: str) -> str:
    """`text` in one line, with escapes for what a terminal would obey or could not show."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
