"""The rest is left alone: what the base said of its own pictures is asked of the network while that learns.

With all values at zero the network is the base, so the base is always at hand.  Before the first step its answers to
`EXAMPLES` noisy latents x_t of pictures that it painted itself (base_pictures.py) are computed once and kept, c being
their own prompts, among them the class prompt, or the empty one.  Every step then adds

    keep_base_weight * |p(x_t, c) - p_base(x_t, c)|^2        mean over numbers and examples

for some of them, p being the denoiser's answer.  It is 0 at the start, its target has no noise in it, and it asks for
nothing but the base.  Comparable losses: learning without forgetting (Li and Hoiem, 2016, arXiv 1606.09282), and prior
preservation (class_pictures.py), whose targets are noise and whose pictures are of the class alone.
"""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svfit_dreambooth.training.objective import Objective, seeded
from svfit_dreambooth.training.watch import nothing_learnt

EXAMPLES = 256
AT_ONCE = 4  # examples that are answered together, however many processes and examples a step has


class KeptBase:
    """The base's answers, and how far the network is from them."""

    def __init__(self, objective: Objective) -> None:
        """Asks the base, that is the networks of `objective` with all values at zero meanwhile.

        The answers stay on the CPU, in the type in which the denoiser computes: in half precision where that does.
        """
        self.objective, self.seed = objective, objective.config.seed
        self.batch_size = kept_batch_size(objective.config.train_batch_size)
        answers = []
        with torch.no_grad(), nothing_learnt(objective.family):
            for first in tqdm(range(0, EXAMPLES, AT_ONCE), desc="asking the base", unit="batch", leave=False):
                answer, _ = objective.predict([objective.draw(first + i, "base") for i in range(AT_ONCE)])
                answers.append(answer.to("cpu", objective.dtype))
        self.answers = torch.cat(answers)  # (EXAMPLES, channels, h, w)

    def loss(self, number: int, process_index: int, num_processes: int) -> Tensor:
        """Mean squared distance from the base of one process's share of micro-batch `number`, a scalar."""
        first = (number * num_processes + process_index) * self.batch_size
        places = [self._place(first + i) for i in range(self.batch_size)]
        answer, _ = self.objective.predict([self.objective.draw(place, "base") for place in places])
        return (answer.float() - self.answers[places].to(answer.device, torch.float32)).square().mean()

    def _place(self, number: int) -> int:
        """Which example is number `number` of the run: each once, then each once in another order, and so on."""
        epoch, place = divmod(number, EXAMPLES)
        return int(torch.randperm(EXAMPLES, generator=seeded(self.seed, "base", "asked", epoch))[place])


def kept_batch_size(train_batch_size: int) -> int:
    """How many examples of the base come beside a batch of photos."""
    return (train_batch_size + 1) // 2
