"""What counts, and what belongs together: arithmetic on cells, no I/O."""

from enum import StrEnum

import numpy as np

from rbc_edge.values import Bool, CellClass, Cells, Counts, Float32, Int64
from rbc_edge.vision.boxes import touching_pairs


class EdgeRule(StrEnum):
    """Which cells at the image border are counted."""

    ALL = "all"
    TWO_SIDES = "two-sides"  # the counting-chamber rule: right and lower border are out
    INSIDE = "inside"


def groups(xyxy: Float32, class_id: Int64, overlapping: Bool) -> Int64:
    """Numbers the groups of overlapping cells of one field.

    A group is a connected component of overlapping red cells and the white cells that touch them. Two cells
    are linked when their boxes, grown by 5 %, intersect. An overlapping red cell without a link gets a number
    of its own: its partner was not found, or lies outside the field. Returns int64 (N,): 1..G in order of
    each group's first cell. 0 for a cell in no group.
    """
    red = overlapping & (class_id == CellClass.RBC)
    member = np.flatnonzero(red | (class_id == CellClass.WBC))
    is_red = red[member]
    a, b = touching_pairs(xyxy[member].astype(np.float64))
    linked = is_red[a] | is_red[b]  # two white cells alone are no group of overlapping red cells
    root = _components(len(member), a[linked], b[linked])
    has_red = np.zeros(len(member), np.bool_)
    has_red[root[is_red]] = True

    group = np.zeros(len(xyxy), np.int64)
    grouped = has_red[root]
    # The root is the smallest index of its component, so sorted roots are in order of the first cell.
    group[member[grouped]] = np.unique(root[grouped], return_inverse=True)[1].reshape(-1) + 1
    return group


def _components(n: int, a: Int64, b: Int64) -> Int64:
    """Returns int64 (n,): for each node the smallest node of its connected component."""
    root = np.arange(n, dtype=np.int64)
    while True:
        before = root.copy()
        lowest = np.minimum(root[a], root[b])
        np.minimum.at(root, before[a], lowest)  # for the whole trees, not only for the two nodes
        np.minimum.at(root, before[b], lowest)
        while not np.array_equal(root, root[root]):
            root = root[root]
        if np.array_equal(root, before):
            return root


def counted(cells: Cells, rule: EdgeRule) -> Bool:
    """Tells which cells the edge rule counts: bool (N,)."""
    sides = {EdgeRule.ALL: [], EdgeRule.TWO_SIDES: [2, 3], EdgeRule.INSIDE: [0, 1, 2, 3]}[rule]
    return np.asarray(~cells.touches_edge[:, sides].any(axis=1), np.bool_)


def count(cells: Cells, rule: EdgeRule = EdgeRule.ALL) -> Counts:
    """Counts the cells of one field of view, cells and never groups, under an edge rule."""
    return cells.counts(counted(cells, rule))
