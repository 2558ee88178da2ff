"""Adapts one pre-trained classifier to a changed task by several methods, each at its own best learning rate.

The steps that `peft_digits.py` and `peft_text.py` share: pre-training, sweeping, repeating, the table.
"""

import copy
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, TinyLoraConfig, get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svfit_dreambooth import SVFitConfig

torch.set_num_threads(1)  # the models are too small for more

HEAD = "classifier"
HEAD_RATES = (1e-2, 3e-2, 1e-1)
SEEDS = (1, 2, 3, 4, 5)  # of batches and new parameters; the sweeps use seed 0


@dataclass
class Data:
    """Examples of a task: arguments of the model's forward by name, (n, ...) each, and labels (n,)."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def part(self, index: Tensor) -> "Data":
        return Data({name: values[index] for name, values in self.inputs.items()}, self.labels[index])

    def split(self, *sizes: int, seed: int = 0) -> list["Data"]:
        """Disjoint random parts of the given sizes, and the rest."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        return [self.part(index) for index in order.split([*sizes, len(order) - sum(sizes)])]


@dataclass
class Method:
    """One way to adapt: a PEFT configuration, or None for plain parameters, and the learning rates to try."""

    config: Callable[[], PeftConfig] | None
    rates: tuple[float, ...]
    trains_body: bool = True


def methods(lora_rank: int, tinylora_values: int) -> dict[str, Method]:
    """The methods of the table; every one of them also trains the new head.

    TinyLoRA trains `tinylora_values` numbers a layer inside the leading 8x8 block of its singular directions.
    """
    common = {"target_modules": "all-linear", "modules_to_save": [HEAD]}
    return {
        "head only": Method(None, HEAD_RATES, trains_body=False),
        "SVFit": Method(lambda: SVFitConfig(**common), (3e-2, 1e-1, 3e-1, 1.0)),
        "TinyLoRA": Method(lambda: TinyLoraConfig(r=8, u=tinylora_values, **common), (3e-3, 1e-2, 3e-2, 1e-1)),
        f"LoRA, rank {lora_rank}": Method(
            lambda: LoraConfig(r=lora_rank, lora_alpha=lora_rank, **common), (3e-3, 1e-2, 3e-2, 1e-1)
        ),
        "all weights": Method(None, (3e-4, 1e-3, 3e-3, 1e-2)),
    }


def fit(
    model: nn.Module, data: Data, steps: int, groups: list[tuple[list[nn.Parameter], float]], batch_size: int, seed: int
) -> None:
    """AdamW without decay, cosine schedule; `groups`: parameters and their learning rate."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in groups if p], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        batch = data.part(torch.randint(len(data.labels), (batch_size,), generator=generator))
        nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    return (model(**data.inputs).logits.argmax(-1) == data.labels).double().mean().item()


def adapt(
    base: nn.Module, method: Method, data: Data, rate: float, head_rate: float, seed: int, steps: int, batch_size: int
) -> tuple[nn.Module, int]:
    """A copy of `base` with a new head, adapted to `data`; and how many values beside the head were trained."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    classes = int(data.labels.max()) + 1
    setattr(model, HEAD, nn.Linear(getattr(model, HEAD).in_features, classes))
    if method.config is not None:
        model = get_peft_model(model, method.config())
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method.trains_body or name.startswith(HEAD))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if HEAD in name]
    body = [p for name, p in trained.items() if HEAD not in name]
    fit(model, data, steps, [(body, rate), (head, head_rate)], batch_size, seed)
    return model, sum(p.numel() for p in body)


def compare(
    base: nn.Module, chosen: Mapping[str, Method], data: Data, sizes: tuple[int, int], steps: int, batch_size: int = 32
) -> list[str]:
    """The lines of a Markdown table: every method at the rate that did best on held-out examples, several seeds.

    `sizes`: examples to train on and to choose rates on; the rest of `data` is the test.
    """
    train, validation, test = data.split(*sizes)
    head_rate = HEAD_RATES[0]
    lines = ["| method | trained values | rate | test accuracy |", "|---|---|---|---|"]
    for name, method in chosen.items():
        found = {}
        for rate in method.rates:
            own = head_rate if method.trains_body else rate
            found[rate] = accuracy(adapt(base, method, train, rate, own, 0, steps, batch_size)[0], validation)
        best = max(found, key=lambda rate: found[rate])
        print(f"{name}: " + ", ".join(f"{rate:g} {value:.3f}" for rate, value in found.items()), flush=True)
        if not method.trains_body:
            head_rate = best
        scores = []
        for seed in SEEDS:
            model, values = adapt(base, method, train, best, head_rate, seed, steps, batch_size)
            scores.append(accuracy(model, test))
        spread = f"{statistics.mean(scores):.1%} ± {statistics.stdev(scores):.1%}"
        lines.append(f"| {name} | {values:,} | {best:g} | {spread} |")
    return lines
