"""A picture as drifting videos wear it down: blurred, too contrasty, too colourful, in the wrong tint.

What identity drift looks like, and that a portrait which shows it is what guidance leads away from: Kling-Avatar, arXiv
2509.09595, section 2.4. How strong each fault is is not told there; the numbers below are ours.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

BLUR = 1 / 64  # standard deviation as a fraction of the shorter side
SATURATION, CONTRAST = 1.5, 1.3  # 1 for none
TINT = (12, 0, -12)  # levels of 255 added to red, green and blue


def wear(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> the same picture, worn."""
    picture = Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR * min(image.shape[:2])))
    picture = ImageEnhance.Color(picture).enhance(SATURATION)
    picture = ImageEnhance.Contrast(picture).enhance(CONTRAST)
    return np.clip(np.asarray(picture, np.int16) + TINT, 0, 255).astype(np.uint8)
