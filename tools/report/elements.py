"""Text, numbers and bars of the page. All text is escaped."""

import html
import re
from collections.abc import Sequence

# Characters that XML forbids even when escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def allowed(value: object) -> str:
    """Converts any value to text without control characters."""
    return _FORBIDDEN.sub("\ufffd", str(value))


def text(value: object) -> str:
    """Converts any value to escaped text for elements and attributes of HTML and XML."""
    return html.escape(allowed(value))


def short(value: float) -> str:
    """Formats a number for an axis: 1.5M, 0.02, 6e-4."""
    if value == 0:
        return "0"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.4g}{unit}"
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def bar(parts: Sequence[tuple[str, float, str]]) -> str:
    """Draws one full-width bar, divided into parts: (style class, share, note)."""
    found, begin = [], 0.0
    for kind, share, note in parts:
        place = f'x="{600 * begin:.1f}" y="0" width="{600 * share:.1f}" height="18"'
        found.append(f'<rect class="part {kind}" {place}><title>{text(note)}</title></rect>')
        begin += share
    return f'<svg class="bar" viewBox="0 0 600 18" role="img" preserveAspectRatio="none">{"".join(found)}</svg>'
