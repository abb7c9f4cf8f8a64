"""ultralytics' own settings stay out of the user's home; the drawn public data of the workshop's tests."""

import atexit
import os
import shutil
import tempfile

if "YOLO_CONFIG_DIR" not in os.environ:  # read when ultralytics is first imported
    _settings = tempfile.mkdtemp(prefix="rbc-edge-tests-")
    atexit.register(shutil.rmtree, _settings, ignore_errors=True)
    os.environ["YOLO_CONFIG_DIR"] = _settings
os.environ["YOLO_OFFLINE"] = "True"
