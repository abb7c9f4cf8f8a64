"""``python -m rbc_export``."""

from rbc_export.cli import main

if __name__ == "__main__":
    main()
