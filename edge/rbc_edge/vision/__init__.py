"""Pixels to cells. No database, no clock, no walk over folders."""

import os
import sys


def quiet_opencv() -> None:
    """Silences OpenCV's own messages about broken and odd files, unless OPENCV_LOG_LEVEL asks for them.

    Only a command-line program calls this, because its tables show what is wrong with a file. In a host
    program OpenCV keeps the host's settings.
    """
    if "OPENCV_LOG_LEVEL" not in os.environ:
        os.environ["OPENCV_LOG_LEVEL"] = "SILENT"  # of processes that begin now
        if opencv := sys.modules.get("cv2"):
            opencv.utils.logging.setLogLevel(opencv.utils.logging.LOG_LEVEL_SILENT)
