"""Formatting of numbers for people."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

COUNTS = ("", "K", "M", "B", "T")
"""Units of counts, such as tokens and parameters: thousands, millions, billions, trillions."""
SI = ("", "k", "M", "G", "T", "P", "E")
"""Prefixes of units."""


def short(value: float, units: tuple[str, ...] = COUNTS) -> str:
    """Format with three digits and a unit: ``4.19B``; ``5e+34`` where no unit is large enough."""
    return "".join(scaled(value, units))


def scaled(value: float, units: tuple[str, ...]) -> tuple[str, str]:
    """Return the digits and the unit of :func:`short`: ``("4.19", "B")``."""
    number = value
    for unit in units:
        if abs(number) < 999.5:
            if not unit:
                return f"{number:.3g}", ""
            decimals = 0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
            return f"{number:.{decimals}f}", unit
        number /= 1000
    return f"{value:.0e}", ""


def compact(value: float, decimals: int) -> str:
    """Format with N decimals, or three digits and a unit from 1000 on: ``22.72``, ``48.6K``."""
    return f"{value:.{decimals}f}" if abs(value) < 1000 else short(value)


def flops(per_second: float) -> str:
    """Format a rate: ``412 TFLOP/s``."""
    digits, prefix = scaled(per_second, SI)
    return f"{digits} {prefix}FLOP/s"


def spoken(name: str) -> str:
    """Return a measure's name as people write it: ``macro_f1`` is ``macro-F1``."""
    written = re.sub(r"\b(f1|r2|mse|mae)\b", lambda m: m[0].upper(), name.replace("_", "-"))
    return written.replace("pearson", "Pearson")


def heading(name: str) -> str:
    """Return a measure's name as a heading: ``Macro-F1``."""
    text = spoken(name)
    return text[:1].upper() + text[1:]


def duration(seconds: float) -> str:
    """Format with the two largest units: ``3d 04h``, ``2h 05m``, ``4m 09s``, ``12s``."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats per token; infinite on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def when(seconds: float) -> str:
    """Format a time in seconds since 1970: ``2026-03-01 17:05 UTC``."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
