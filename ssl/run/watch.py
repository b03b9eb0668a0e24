"""Does training go wrong? Jumps of loss and gradient, against what they usually are, at the log line after them."""

from collections import deque
from statistics import median

LINES, FEWEST = 10, 5  # so many log lines, and at least so few, say what is usual; so few say that it is back
FACTOR = 1000  # a gradient's norm so much larger or smaller than usual; in healthy runs it moves by up to 15 at once
RISE, SPREADS = 0.1, 10  # a loss above the usual by this part of it, and by so many times its median deviation


class Watch:
    """Follows a run from log line to log line. What is out of the usual does not change what is usual."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=LINES)
        self.norms: deque[float] = deque(maxlen=LINES)
        self.named: set[str] = set()  # since all was as usual
        self.calm = 0

    @property
    def doubtful(self) -> bool:
        """Whether loss or gradient have left the usual and are not back for good."""
        return bool(self.named)

    def __call__(self, loss: float, norm: float) -> list[str]:
        """What has begun to go wrong, each once until all is as usual again.

        Args:
            loss: mean since the last log line; norm: the largest norm of the gradient since then.
        """
        found = {}
        if len(self.norms) >= FEWEST:
            usual = median(self.norms)
            if not usual / FACTOR <= norm <= usual * FACTOR:
                found["gradient"] = f"the gradient's norm is {norm:.2g}, and was usually {usual:.2g}"
        if len(self.losses) >= FEWEST:
            usual = median(self.losses)
            spread = median(abs(value - usual) for value in self.losses)
            if loss - usual > max(RISE * abs(usual), SPREADS * spread):
                found["loss"] = f"the loss is {loss:.3f}, and was usually {usual:.3f}"
        if "gradient" not in found:
            self.norms.append(norm)
        if "loss" not in found:
            self.losses.append(loss)
        new = [text for name, text in found.items() if name not in self.named]
        self.calm = 0 if found else self.calm + 1
        self.named = set() if self.calm >= FEWEST else self.named | found.keys()
        return new
