"""``rbc-edge --version``, which names the bundle. Loads no library that counts, so that it always works."""

from rbc_edge import __version__
from rbc_edge.cli.options import Given
from rbc_edge.errors import UsageError
from rbc_edge.vision.bundle import claimed_id


def print_version() -> None:
    """Prints the version of the program and the bundle that would count."""
    try:
        folder = Given().load().settings.bundle
    except UsageError:  # the version may be asked for to find out what is wrong with the settings
        folder = None
    bundle_id = claimed_id(folder)
    print(f"rbc-edge {__version__}, {f'bundle {bundle_id}' if bundle_id else 'no bundle'}")
