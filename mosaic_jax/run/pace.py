"""How many steps of a loop run in one call, so that a signal need not wait for long."""

# Factor by which a call may have more steps than the one before.
GROWTH = 4


class Pace:
    """Steps that take about some seconds, by what earlier ones took.

    Attributes:
      steps: that the next call may have, >= 1.
      is_quick: whether the last call is known to have taken no longer than it may.
    """

    def __init__(self, seconds: float, most: int) -> None:
        """Nothing is measured yet: the first calls have one step.

        Args:
          seconds: that a call may take, > 0.
          most: steps that a call may have.
        """
        self._seconds, self._most = seconds, most
        self._is_compiled = False
        self.steps, self.is_quick = 1, False

    def took(self, steps: int, seconds: float) -> None:
        """Tell of a call; the first is not counted, as it compiles.

        Args:
          steps: that it had.
          seconds: that they took.
        """
        if not self._is_compiled:
            self._is_compiled = True
            return
        allowed = self._seconds * steps / max(seconds, 1e-9)
        self.steps = int(max(1, min(allowed, GROWTH * self.steps, self._most)))
        self.is_quick = seconds <= self._seconds
