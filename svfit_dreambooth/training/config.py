"""The configuration of a training run; its options are in options.py."""

import dataclasses
import logging
from dataclasses import dataclass

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.options import (
    AdapterOptions,
    ModelOptions,
    OptimizationOptions,
    OutputOptions,
    PhotoOptions,
    PriorOptions,
    WatchOptions,
    check_options,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig(
    ModelOptions, PhotoOptions, PriorOptions, AdapterOptions, OptimizationOptions, WatchOptions, OutputOptions
):
    """All options of a run; each is explained, and its values are limited, where its group declares it.

    Raises SVFitError for values that no run could use.
    """

    def __post_init__(self) -> None:
        if isinstance(self.rank, int) and not isinstance(self.rank, bool):
            object.__setattr__(self, "rank", str(self.rank))
        check_options(self)
        numbered = self.rank not in (None, "full")
        if numbered and not (self.rank.isdecimal() and 0 < int(self.rank[:10]) < 10**9):
            raise SVFitError(f'rank is {self.rank!r}: give a whole number of 1 or more, or "full".', "rank")
        if self.energy is not None and numbered:
            raise SVFitError("energy chooses the ranks itself: leave rank out.", "energy", "rank")
        if self.budget is not None:
            others = {"rank": numbered, "energy": self.energy, "init_adapter": self.init_adapter}
            for name in (name for name, given in others.items() if given):
                raise SVFitError(f"budget chooses the singular values itself: leave {name} out.", "budget", name)

    def warn_of_lora_values(self) -> None:
        """Logs a warning where rank or learning rate look like those of a LoRA command."""
        if self.rank_value != "full" and self.energy is None and self.rank_value < 16:
            logger.warning(
                "rank %s trains only %s numbers in each layer, far fewer than a LoRA of as much does: "
                "leave it out to train all singular values.",
                self.rank,
                self.rank,
                extra={"parameters": ("rank",)},
            )
        if self.learning_rate not in (None, "auto") and float(self.learning_rate) < 1e-3:
            logger.warning(
                "learning_rate %g suits LoRA matrices; singular values barely move with it: leave it out, and it follows "
                "from the base.",
                self.learning_rate,
            )


def config_to_yaml(config: TrainConfig) -> str:
    """The options as YAML that the command line's `--config` reads back to the same configuration."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
