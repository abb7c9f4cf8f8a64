"""Counts compared with those of the unchanged photographs, as text."""

from collections.abc import Mapping
from typing import Protocol


class Counted(Protocol):
    """Red cells of an experiment."""

    @property
    def n_rbc(self) -> int:
        """Red cells counted in all fields."""

    @property
    def n_rbc_of_source(self) -> Mapping[str, int]:
        """Red cells counted by camera."""


def change(n: int, plain: int) -> str:
    """Returns how much a count differs from another, in percent."""
    return f"{100 * (n / plain - 1):+.1f} %" if plain else "–"


def changes(trial: Counted, plain: Counted) -> list[str]:
    """Returns the change of all red cells, then of those of each camera of `plain`."""
    of_source = plain.n_rbc_of_source
    return [
        change(trial.n_rbc, plain.n_rbc),
        *(change(trial.n_rbc_of_source[s], of_source[s]) for s in of_source),
    ]
