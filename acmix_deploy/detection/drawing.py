"""Boxes with their names, drawn on images."""

from __future__ import annotations

from collections.abc import Sequence

from acmix_deploy.detection.images import Image, opencv

PALETTE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#6a51a3", "#8c564b", "#4d4d4d")
"""For classes: those colours of Okabe and Ito on which white text can be read, and three darker ones."""


def draw_box(image: Image, corners: Sequence[float], text: str, colour: str) -> None:
    """Draw into an image [h, w, 3] in BGR.

    Args:
        corners: x1, y1, x2, y2 in pixels.
        text: stands in the box's colour above it, or in it where there is no room.
        colour: ``#rrggbb``.

    Raises:
        MissingComponent: OpenCV is not installed.
    """
    cv2, bgr = opencv(), tuple(bytes.fromhex(colour[1:]))[::-1]
    left, top, right, bottom = (round(edge) for edge in corners)
    width = max(2, image.shape[1] // 400)
    scale = width / 4
    cv2.rectangle(image, (left, top), (right, bottom), bgr, width)
    (wide, high), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    base = max(top, high + below)
    cv2.rectangle(image, (left, base - high - below), (left + wide, base), bgr, cv2.FILLED)
    cv2.putText(image, text, (left, base - below), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
