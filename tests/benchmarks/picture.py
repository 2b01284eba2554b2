"""A picture of a comparison: bars of how many times faster, and curves of time by number of turns."""

SIDES = {"trl": ("TRL", "#b0b0b0"), "trl_toolgrpo": ("trl_toolgrpo", "#2a6fbb")}


def draw(ratios: dict[str, float], growth: dict[int, dict[str, float]]) -> str:
    """
    Args:
        ratios (`dict[str, float]`):
            How many times faster than TRL, by case.
        growth (`dict[int, dict[str, float]]`):
            Seconds of each side, by number of turns; may be empty.

    Returns:
        `str`: an SVG.
    """
    height = 60 + 34 * len(ratios)
    parts = [_text(10, 22, "Rollouts: times faster than TRL", bold=True)]
    widest = max([1.0, *ratios.values()])
    for place, (name, ratio) in enumerate(ratios.items()):
        top = 40 + 34 * place
        parts.append(_text(10, top + 15, name))
        parts.append(f'<rect x="370" y="{top}" width="{260 * ratio / widest:.0f}" height="20" fill="#2a6fbb"/>')
        parts.append(_text(376 + 260 * ratio / widest, top + 15, f"{ratio:.1f}x"))
    if growth:
        parts.append(_text(10, height + 10, "Seconds of a rollout batch, by number of turns", bold=True))
        parts += _curves(growth, height + 30)
        height += 270
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {height}" font-family="sans-serif" font-size="13">'
        f'\n<rect width="700" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def _curves(growth: dict[int, dict[str, float]], top: float) -> list[str]:
    most, longest = max(growth), max(s for found in growth.values() for s in found.values())
    across, down = (lambda turns: 60 + 520 * turns / most), (lambda seconds: top + 190 - 180 * seconds / longest)
    parts = [f'<path d="M60 {top} V{top + 190} H600" fill="none" stroke="#444"/>']
    parts += [_text(across(turns) - 4, top + 207, str(turns)) for turns in growth]
    parts.append(_text(10, down(longest) + 5, f"{longest:.0f} s"))
    for side, (label, colour) in SIDES.items():
        points = [(across(turns), down(found[side])) for turns, found in growth.items() if side in found]
        if points:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
            parts.append(_text(points[-1][0] + 6, points[-1][1] + 4, label))
    return parts


def _text(x: float, y: float, text: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{weight}>{text}</text>'
