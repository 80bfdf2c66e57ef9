"""Examples of a report, small enough to know each pixel."""

from __future__ import annotations

import numpy as np

from advmed.report import Example, View

POINTS = np.array([(2.0, 1.0), (np.nan, np.nan), (13.0, 6.5)])
FOUND = np.array([(6.0, 1.0), (3.0, 8.0), (13.0, 6.5)])


def segmented() -> Example:
    """A black and a white half, a region over both; found by one view and missed by the other."""
    image = np.zeros((6, 8))
    image[:, 4:] = 1
    truth = np.zeros((6, 8), int)
    truth[2:4, 2:6] = 1
    views = [
        View("STD", "", 0, image, truth, "Dice 1.00"),
        View("STD", "pgd100", 5, image + 0.01 * truth, np.zeros_like(truth), "Dice 0.00"),
    ]
    return Example("case_a", image, truth, views)


def landmarks(height: int = 10, width: int = 16, scale: float = 1.0, *, colour: bool = False) -> Example:
    """Three landmarks, one of them not known; one is found four pixels too far right, one where it is."""
    image = np.full((height, width, 3) if colour else (height, width), 0.5)
    image[0, 0], image[-1, -1] = 0, 1
    views = [View("own", "", 0, image, points=FOUND * scale, note="MRE 2.00 px")]
    return Example("skull", image, None, views, points=POINTS * scale)
