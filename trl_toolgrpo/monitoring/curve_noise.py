"""Tells rounding from change in a logged figure: a curve of nothing but rounding is drawn flat."""

import re


RELATIVE = 1e-6
"""Share of a figure by which float32 rounding moves it, with room for sums."""

# Figures made of log-probs, which are numbers of order 1 and more: small ones keep the rounding of those
_OF_LOGPROBS = re.compile(r"(?:.*[/_])?(?:ratio|kl|loss|sampling)(?:[/_].*)?")


def is_flat(low: float, high: float, metric: str) -> bool:
    """
    Return whether a curve between two values shows nothing but rounding.

    Args:
        low, high (`float`):
            Its least and its largest value.
        metric (`str`):
            Name of the figure.
    """
    largest = max(abs(low), abs(high))
    scale = max(largest, 1.0) if _OF_LOGPROBS.fullmatch(metric) else largest
    return high - low <= RELATIVE * scale
