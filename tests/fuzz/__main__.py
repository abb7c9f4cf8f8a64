"""``python -m tests.fuzz``. Without the loop itself: a process that is spawned does not import `__main__`."""

import sys

from tests.fuzz.fuzzing import main

if __name__ == "__main__":
    sys.exit(main())
