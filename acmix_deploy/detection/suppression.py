"""What non-maximum suppression is told."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

CONFIDENCE = 0.25
IOU = 0.7
MOST = 300
"""Defaults of Ultralytics' ``predict``: smallest score, overlap of two boxes of one class, detections in an image."""


class Suppression(BaseModel):
    """Which boxes of an image are told: of those that overlap the one with the highest score."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    confidence: float = Field(default=CONFIDENCE, ge=0, lt=1, description="score that a box has to be above")
    iou: float = Field(default=IOU, ge=0, le=1, description="overlap, as intersection over union, up to which two stay")
    most: int = Field(default=MOST, ge=1, le=3000, description="boxes of an image at most")
    by_class: bool = Field(default=True, description="whether boxes of different classes may overlap")

    def hidden(self, file: str, confidence: float) -> str:
        """What is to be said where boxes above another score are asked of a file; empty where there is nothing."""
        if confidence >= self.confidence:
            return ""
        return (
            f"{file} suppresses boxes and gives none of a score up to {self.confidence:g}, so those from "
            f"{confidence:g} on are missing"
        )
