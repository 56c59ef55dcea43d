"""Pipelines of GStreamer as text, for OpenCV to run: through the hardware of a Jetson where that is there.

Nothing in a pipeline is as a user spelt it: files are URIs or descriptors, and URLs are percent-encoded, so that no
name can add an element. (Quoting does not do: the grammar of gst_parse_launch takes a backslash at the end of a word,
escaped or not, together with what follows.)
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

CSI = "csi"
"""Scheme of a Jetson's own cameras: csi://0."""

_KEPT = "/:?#[]@$&()*+,;=%-._~"  # of a URL: what stands for itself in it and means nothing to GStreamer
_LATENCY_MS = 200  # of RTSP; by default two seconds are held back
_BITS = 0.1  # of H.264 for a pixel


class Elements(NamedTuple):
    """The elements that differ between machines."""

    to_bgr: str
    """From what a decoder or a camera gives to any layout in memory that videoconvert takes."""
    encode: str
    """From BGR in memory to H.264 of ``{bitrate}`` bits in a second; empty where OpenCV's own writer is taken."""


JETSON = Elements(
    "nvvidconv ! video/x-raw,format=BGRx",
    "videoconvert ! video/x-raw,format=BGRx ! nvvidconv ! video/x-raw(memory:NVMM),format=NV12 "
    "! nvv4l2h264enc bitrate={bitrate} ! h264parse",
)
SOFTWARE = Elements("videoconvert", "")


def reading(source: Path | int | str, elements: Elements) -> str:
    """The pipeline that reads a source into an appsink, BGR.

    A decoder is chosen by its rank (decodebin), which is highest for the hardware's.

    Args:
        source: a video file, the index of a camera, or a URL; ``csi://N`` is a camera at a Jetson's own connector.
        elements: of this machine.
    """
    decoded = f"decodebin ! {elements.to_bgr}"
    if isinstance(source, Path):
        start = f"uridecodebin uri=file://{quote(bytes(source.resolve()))} ! {elements.to_bgr}"
    elif isinstance(source, int):
        start = f"v4l2src device=/dev/video{source} ! {decoded}"
    elif (scheme := urlsplit(source).scheme) == CSI:
        sensor = int(urlsplit(source).netloc)
        start = f"nvarguscamerasrc sensor-id={sensor} ! video/x-raw(memory:NVMM),format=NV12 ! {elements.to_bgr}"
    elif scheme in ("rtsp", "rtsps"):
        start = f"rtspsrc location={_url(source)} latency={_LATENCY_MS} ! application/x-rtp,media=video ! {decoded}"
    else:
        start = f"uridecodebin uri={_url(source)} ! {elements.to_bgr}"
    sink = "appsink sync=false max-buffers=2" + ("" if isinstance(source, Path) else " drop=true")
    return f"{start} ! videoconvert ! video/x-raw,format=BGR ! {sink}"


def writing(descriptor: int, size: tuple[int, int], fps: float, elements: Elements) -> str:
    """The pipeline that writes frames of an appsrc as H.264 in MP4.

    Args:
        descriptor: of a file that is open for writing.
        size: width and height of the frames.
        fps: frames in a second.
        elements: of this machine, which encodes.
    """
    encode = elements.encode.format(bitrate=round(size[0] * size[1] * fps * _BITS))
    return f"appsrc ! {encode} ! qtmux ! fdsink fd={descriptor}"


def has_element(name: str) -> bool:
    """Whether GStreamer's library is here and knows an element."""
    try:
        library = ctypes.CDLL("libgstreamer-1.0.so.0")
    except OSError:
        return False
    library.gst_init(None, None)
    library.gst_element_factory_find.restype = ctypes.c_void_p
    return bool(library.gst_element_factory_find(name.encode()))


def _url(text: str) -> str:
    return quote(text, safe=_KEPT)
