"""The contrast of two colours, by WCAG."""

import numpy as np


def linear_rgb(color: str) -> np.ndarray:
    c = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(
    one: str,
    other: str,
) -> float:
    weights = (0.2126, 0.7152, 0.0722)
    dark, light = sorted(float(linear_rgb(each) @ weights) for each in (one, other))
    return (light + 0.05) / (dark + 0.05)
