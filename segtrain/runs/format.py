"""Format times and names for terminals."""

# Singular, plural and length in seconds.
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


def format_age(seconds: float) -> str:
    """Format as one number and its unit, rounded down: `3 hours`, or `just now` below 5 s."""
    if seconds < _JUST_NOW:
        return "just now"
    singular, plural, length = next(unit for unit in _UNITS if seconds >= unit[2])
    count = int(seconds // length)
    return f"{count} {singular if count == 1 else plural}"


def format_duration(seconds: float) -> str:
    """Format with at most two units: `2 h 05 min`, `3 min 09 s`, `12 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def escape_unprintable(text: str) -> str:
    """Escape line breaks, terminal control sequences and characters that cannot be printed."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
