"""``python -m rbc_edge``: the command line."""

from rbc_edge.cli import main

if __name__ == "__main__":
    main()
