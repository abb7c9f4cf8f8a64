"""Pixels to cells. No database, no clock, no walk over folders."""

import os


def quiet_opencv() -> None:
    """Silences OpenCV's own messages about broken files, if OpenCV is not loaded yet.

    Only a command-line program calls this, because its tables show what is wrong with a file. In a host
    program OpenCV keeps the host's settings.
    """
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
