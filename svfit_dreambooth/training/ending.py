"""How the steps of a run ended."""

from dataclasses import dataclass
from typing import Literal

from svfit_dreambooth.errors import SVFitError


@dataclass(frozen=True)
class Ending:
    """How the steps of a run ended."""

    step: int  # the last one made
    kept: int  # the one whose values are in place now
    seconds: float  # of the steps
    loss_before: float | None  # on fixed noise and timesteps; None: not measured
    loss_after: float | None
    stopped: bool = False  # before the last step
    hurried: bool = False  # asked to stop while the last step was made: what takes long after it is left out
    failure: SVFitError | None = None  # numbers that stayed bad; the values are the last good ones

    @property
    def status(self) -> Literal["finished", "stopped", "failed"]:
        return "failed" if self.failure is not None else "stopped" if self.stopped else "finished"
