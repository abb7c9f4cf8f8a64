"""rbc-edge: counts single and overlapping red blood cells in smear images, on the CPU, without torch."""

__version__: str

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    # Asked for when it is wanted: to look it up takes a third of the time of `rbc-edge --help`.
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    try:
        return version("rbc-edge")
    except PackageNotFoundError:  # running from a source tree that was never installed
        return "0+source"
