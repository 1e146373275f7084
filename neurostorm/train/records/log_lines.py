"""The lines that rank 0 prints as training goes: one event each, for people and for grep.

    line("step", "120/5000", loss=0.41234, wait=percent(0.002)) -> step 120/5000 loss=0.4123 wait=0.2%

An event's name comes first, then what it is about, then key=value without blanks. Keys carry their unit, as metrics do;
names and keys that are there stay, new ones come last.
"""

SIGNIFICANT = 4  # digits of a number


def line(event: str, about: str = "", **values: object) -> str:
    """One line; floats are rounded to 4 significant digits."""
    return " ".join([event, *filter(None, [about]), *(f"{key}={_text(value)}" for key, value in values.items())])


def percent(share: float) -> str:
    """0.002 -> 0.2%."""
    return f"{100 * share:.1f}%"


def _text(value: object) -> str:
    return f"{value:.{SIGNIFICANT}g}" if isinstance(value, float) else str(value)
