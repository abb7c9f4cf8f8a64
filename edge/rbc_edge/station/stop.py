"""The wish to end: signals, and how long the image in hand may still take."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


class Abandoned(BaseException):
    """The image in hand is left where it is. Not an error of the image, so no `Exception`."""


@dataclass(slots=True)
class Stop:
    """A wish to end after the image in hand."""

    signal: int | None = None  # the one that asked; None: go on
    patience_s: float | None = None  # how long the image in hand may take then; None: as long as it needs
    is_late: bool = False  # the image in hand took longer than that, and was left
    on_ask: Callable[[], None] = lambda: None  # called from the signal handler
    _in_hand: bool = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Takes SIGINT and SIGTERM as the wish. A second one ends the process at once."""

        def ask(number: int, _frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before[number])
            if self.patience_s is not None:
                signal.signal(signal.SIGALRM, lose_patience)
                signal.setitimer(signal.ITIMER_REAL, self.patience_s)
            self.on_ask()

        def lose_patience(_number: int, _frame: FrameType | None) -> None:
            self.is_late = True
            if self._in_hand:
                raise Abandoned

        before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def image_in_hand(self) -> Iterator[None]:
        """Marks code that may be left at any point, by `Abandoned`: it changes nothing that lasts."""
        self._in_hand = True
        try:
            if self.is_late:
                raise Abandoned
            yield
        finally:
            self._in_hand = False
