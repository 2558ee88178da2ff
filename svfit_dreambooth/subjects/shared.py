"""Several runs in one set of networks: what a layer computes with comes from the run whose picture it sees.

All runs of a base train numbers along the same directions, so one forward and backward pass serves all of them: sample
i of a batch meets the shifts of its own run (see `method.layer`), and each run's values get their own gradient.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from svfit_dreambooth.adapter.words import word_key
from svfit_dreambooth.method.arithmetic import padded
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.method.weights import chosen, joined
from svfit_dreambooth.method.word import word_embedding, word_pieces
from svfit_dreambooth.training.budget import spread
from svfit_dreambooth.training.optimizer import Steps
from svfit_dreambooth.training.plan import Plan
from svfit_dreambooth.training.trainable import Trainable
from svfit_dreambooth.training.words import learn_words, learned_words, word_rows

Place: TypeAlias = tuple[nn.Module, str]  # a module, and the name of its parameter
Positions: TypeAlias = Mapping[str, Tensor] | None  # see `budget.choose_positions`


class Shared:
    """The networks of one base, patched once for all of `plans`."""

    def __init__(
        self,
        plans: Sequence[Plan],
        weights: Mapping[str, Tensor],
        hashes: Mapping[str, str],
        positions: Sequence[Positions],
        accelerator: Accelerator,
    ) -> None:
        """`weights`, `hashes`: see `Trainable`; `positions`: of each plan, of which the layers hold the union."""
        words = list(dict.fromkeys(word for plan in plans if (word := plan.config.learned_word) is not None))
        self.family = plans[0].base.family
        # what all plans have in common
        self.plan = replace(
            plans[0],
            initial=None,
            config=replace(plans[0].config, init_adapter=None, learned_word=words[0] if words else None),
        )
        prints = _base_fingerprints(plans, positions, weights, hashes)  # before anything is cast
        self.union = _union(positions)
        self.trainable = Trainable(self.plan, weights, hashes, self.union, accelerator)
        for word in words[1:]:
            learn_words(self.family, word)
        self.places: dict[str, Place] = {
            f"{component}.{name}": (layer, "shift")
            for component in self.plan.targets
            for name, layer in svfit_layers(self.family.components[component]).items()
        }
        for component, encoder in (self.family.text_encoders if words else {}).items():
            embedding = word_embedding(encoder)
            assert embedding is not None
            for word in words:
                pieces = word_pieces(self.family.tokenizers[component], word)
                self.places[word_place(component, word)] = (embedding, embedding.words[pieces])
        for module, attribute in self.places.values():
            getattr(module, attribute).requires_grad_(False)
        self.owns = [Own(self, *each) for each in zip(plans, positions, prints, strict=True)]

    @contextmanager
    def worn(self, own: "Own") -> Iterator[None]:
        """Within it the networks compute with the values of one run."""
        with _standing_in(self.places, {place: own.row(place) for place in self.places}):
            yield

    @contextmanager
    def each(self, owns: Sequence["Own"]) -> Iterator[None]:
        """Within it sample i of a batch meets the values of `owns[i]`, and gradients flow to them."""
        different = list(dict.fromkeys(owns))
        index = torch.tensor([different.index(own) for own in owns], device=self.trainable.accelerator.device)
        rows = {}
        for place, (_, attribute) in self.places.items():
            chosen = torch.stack([own.row(place) for own in different])[index]  # (batch, r) or (batch, k, dim)
            rows[place] = chosen[:, None] if attribute == "shift" else chosen
        with _standing_in(self.places, rows):
            yield

    def remove(self) -> None:
        """See `Trainable.remove`."""
        self.trainable.remove()


class Own:
    """The values of one run of several, as `Trainable` holds those of a single one."""

    steps: Steps

    def __init__(self, shared: Shared, plan: Plan, positions: Positions, base_fingerprint: dict[str, Any]) -> None:
        self.plan, self.positions, self.shared, self.base_fingerprint = plan, positions, shared, base_fingerprint
        family, word = shared.family, plan.config.learned_word
        self.where: dict[str, Tensor] = {}  # of the run's values among those that the layer holds
        self.values: dict[str, nn.Parameter] = {}
        for name in (name for name in plan.shapes if positions is None or name in positions):
            held = self._held(name)  # (r,)
            if positions is None:
                own = torch.zeros_like(held)
            else:
                assert shared.union is not None
                self.where[name] = torch.searchsorted(shared.union[name], positions[name]).to(held.device)
                own = held.new_zeros(len(positions[name]))
            if plan.initial is not None and name in plan.initial.shifts:
                own.copy_(padded(plan.initial.shifts[name], len(own)))
            self.values[name] = nn.Parameter(own)
        self.roles: dict[str, str] = {name: family.role(name) for name in self.values}
        self.words = {} if word is None else {word_place(c, word): word_key(c, 0) for c in family.text_encoders}
        for place, name in self.words.items():
            own = torch.zeros_like(self._held(place))  # (k, dim)
            known = {} if plan.initial is None else plan.initial.word_deltas()
            if name in known:
                own.copy_(known[name])
            self.values[name] = nn.Parameter(own)
            self.roles[name] = "word"

    def _held(self, place: str) -> Tensor:
        module, attribute = self.shared.places[place]
        return getattr(module, attribute).detach()

    def row(self, place: str) -> Tensor:
        """What `place` computes with for this run, in the shape of its parameter; zeros where the run trains nothing."""
        value = self.values.get(self.words.get(place, place))
        if value is None:
            return torch.zeros_like(self._held(place))
        if place not in self.where:
            return value
        return self._held(place).new_zeros(self._held(place).shape).index_copy(0, self.where[place], value)

    @property
    def count(self) -> int:
        """Singular values that are trained."""
        return sum(value.numel() for name, value in self.values.items() if self.roles[name] != "word")

    def learnt(self) -> dict[str, Any]:
        """The values as fields of an `Adapter`."""
        copies = {name: value.detach().cpu().clone() for name, value in self.values.items()}
        shifts = {name: copy for name, copy in copies.items() if self.roles[name] != "word"}
        fields: dict[str, Any] = {"shifts": shifts if self.positions is None else spread(shifts, self.positions)}
        word = self.plan.config.learned_word
        return fields if word is None else fields | {"learned_words": learned_words(self.shared.family, word, copies)}


def word_place(component: str, word: str) -> str:
    """The name of the place of a learned word in a text encoder."""
    return f"{component} {word}"


def _base_fingerprints(
    plans: Sequence[Plan], positions: Sequence[Positions], weights: Mapping[str, Tensor], hashes: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Of all that each plan adapts; those that adapt the same share one."""
    found: list[dict[str, Any]] = []
    of_all: dict[str | None, dict[str, Any]] = {}  # by their learned word
    for plan, own in zip(plans, positions, strict=True):
        word = plan.config.learned_word
        adapted = weights if own is None else chosen(weights, own)
        if own is not None or word not in of_all:
            of_all[word] = fingerprint(joined(adapted, word_rows(plan.base.family, word)), hashes)
        found.append(of_all[word])
    return found


def _union(positions: Sequence[Positions]) -> dict[str, Tensor] | None:
    """All positions of a layer that one of several runs trains, ascending; None where all train all."""
    chosen = [own for own in positions if own is not None]
    if not chosen:
        return None
    names = dict.fromkeys(name for own in chosen for name in own)
    return {name: torch.cat([own[name] for own in chosen if name in own]).unique() for name in names}


@contextmanager
def _standing_in(places: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it modules compute with `tensors` in place of their parameters, as in `torch.func.functional_call`.

    The backward pass, too: gradient checkpointing computes layers again.
    """
    before = {name: module._parameters[attribute] for name, (module, attribute) in places.items()}
    try:
        for name, (module, attribute) in places.items():
            module._parameters[attribute] = tensors[name]  # type: ignore[assignment]
        yield
    finally:
        for name, (module, attribute) in places.items():
            module._parameters[attribute] = before[name]
