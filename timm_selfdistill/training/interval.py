"""How often checkpoints are written."""
import re
import time

_SECONDS = {"s": 1, "m": 60, "h": 3600}


class Interval:
    """So many updates, or so much time.

    Args:
        text: "500" is every 500 updates; "90s", "10m", "1h" is time; "" is never.

    Raises:
        ValueError: it is neither.
    """

    def __init__(self, text: str):
        match = re.fullmatch(r"(\d{1,9})([smh]?)", text)
        if text and (match is None or int(match[1]) == 0):
            raise ValueError(f"checkpoint_interval must be updates or a time such as 500, 90s, 10m or 1h, got {text!r}")
        number = int(match[1]) if text else 0
        self.updates = number if text and not match[2] else 0
        self.seconds = number * _SECONDS[match[2]] if text and match[2] else 0
        self.last = time.monotonic()

    def is_due(self, updates: int) -> bool:
        """By the number of updates: the same answer on every process."""
        return self.updates > 0 and updates % self.updates == 0

    def is_overdue(self) -> bool:
        """By the clock of this process."""
        return self.seconds > 0 and time.monotonic() - self.last >= self.seconds

    def restart(self) -> None:
        """A checkpoint is there."""
        self.last = time.monotonic()
