"""Times and names as people read them."""

_UNITS = (
    ("year", 365 * 86400),
    ("month", 30 * 86400),
    ("week", 7 * 86400),
    ("day", 86400),
    ("hour", 3600),
    ("minute", 60),
    ("second", 1),
)
_JUST_NOW = 5


def age_in_words(seconds: float) -> str:
    """One number and its unit, rounded down: `3 minutes`; `just now` for what is to come, too."""
    if seconds < _JUST_NOW:
        return "just now"
    unit, length = next((unit, length) for unit, length in _UNITS if seconds >= length)
    count = int(seconds // length)
    return f"{count} {unit}{'s' if count > 1 else ''}"


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
