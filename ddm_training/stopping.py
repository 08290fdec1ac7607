"""When a training is to end before its last step: its time is over, or the process was asked to."""

import math
import signal
import threading
import time

AGAIN_AFTER = 2.0  # seconds; torchrun and a cluster each pass on the same one request within milliseconds
HANGUP = getattr(signal, "SIGHUP", None)  # a terminal or a connection has ended; not on Windows


class StopRequest:
    """True once the time is over or the process was asked to end.

    By SIGTERM or SIGINT, as clusters and people do, or by SIGHUP, unless that is ignored, as `nohup` has it. Asked
    again, `AGAIN_AFTER` or more later and by one of the former, it raises `KeyboardInterrupt`.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._asked: float | None = None
        if threading.current_thread() is threading.main_thread():
            numbers: list[signal.Signals] = [signal.SIGTERM, signal.SIGINT]
            if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
                numbers.append(HANGUP)
            self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        else:
            self._previous = {}

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif now - self._asked >= AGAIN_AFTER and number != HANGUP:  # a shell and its terminal may tell of one each
            raise KeyboardInterrupt  # asked twice: do not wait for the step to end

    def __bool__(self) -> bool:
        return self._asked is not None or time.monotonic() > self._end

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """The training process alone decides when to end; its workers go with it."""
    for number in (signal.SIGTERM, signal.SIGINT, HANGUP):
        if number is not None:
            signal.signal(number, signal.SIG_IGN)
