"""``python -m rbc_train``: parsing only."""

from rbc_train.cli import main

if __name__ == "__main__":
    main()
