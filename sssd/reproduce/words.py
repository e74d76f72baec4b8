"""Numbers, intervals and lists as text: the one place that decides how a report writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..config import RunConfig
from ..intervals import Interval


def direction(difference: Interval) -> str:
    """What the interval of a difference shows."""
    if not difference.known:
        return "not known"
    if not difference.distinct:
        return "no clear difference"
    return "higher" if difference.estimate > 0 else "lower"


def number(value: float, places: int = 1, sign: bool = False) -> str:
    """A number with a true minus sign; ``sign`` also shows a plus. What rounds to 0 has no sign."""
    text = format(value, f"{'+' if sign else ''}.{places}f")
    return (text if text.strip("+-0.") else text.lstrip("+-")).replace("-", "−")


def percent(value: float) -> str:
    """A fraction such as AP as the papers print it: in points of 100, one decimal; NaN is empty."""
    return "" if value != value else number(100 * value)


def bracketed(value: Interval, sign: bool = False) -> str:
    """A fraction in points of 100 with its 95 % interval, where there is one; NaN is empty."""
    if value.estimate != value.estimate:
        return ""
    ends = (value.estimate, value.low, value.high)
    estimate, low, high = (number(100 * x, sign=sign) for x in ends)
    return f"{estimate} [{low}, {high}]" if value.known else estimate


def signed(difference: Interval) -> str:
    """A difference as `bracketed` writes it, with its sign."""
    return bracketed(difference, sign=True)


def compared(difference: Interval) -> str:
    """A difference in points with its interval, and what that shows."""
    one_seed = " with this one seed" * (difference.distinct and difference.seeds == 1)
    return f"{signed(difference)} points, {direction(difference)}{one_seed}"


def listed(names: Sequence[object]) -> str:
    """``a, b and c``."""
    *first, last = map(str, names) if names else [""]
    return f"{', '.join(first)} and {last}" if first else last


def counted(number: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds up to 90, minutes up to 90, else hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def weight(config: RunConfig) -> str:
    """A run's λ: ``75``, or ``75 → 100`` where it steps at T1."""
    return f"{config.lambda1:g}" + (f" → {config.lambda2:g}" if config.stepwise else "")


def markdown(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no formula, no link."""
    return re.sub(r"([\\`*_<>|#~$&]|\](?=\())", r"\\\1", text)


def code(text: str) -> str:
    """Text as Markdown's code, which a terminal shows without escapes."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda sign: words.get(sign[0], "\\" + sign[0]), text)
