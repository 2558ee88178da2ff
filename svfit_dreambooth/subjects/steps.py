"""The steps of several runs in shared networks: one forward and backward pass for all that are under way."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.subjects.shared import Own, Shared
from svfit_dreambooth.training.checkpoints import TrainState
from svfit_dreambooth.training.ending import Ending
from svfit_dreambooth.training.events import Stepped
from svfit_dreambooth.training.loop import Loop
from svfit_dreambooth.training.objective import Draw, Loss, by_shape
from svfit_dreambooth.training.signals import stop_signals
from svfit_dreambooth.training.stepping import Losses, NotFinite

OnStep = Callable[[str, Stepped], bool | None]


@dataclass(eq=False)
class Member:
    """A run among those that make their steps together."""

    loop: Loop = field(init=False)
    own: Own = field(init=False)
    resumed: TrainState | None = field(default=None, init=False)
    ending: Ending = field(init=False)
    stopped: bool = field(default=False, init=False)  # by on_step
    failure: SVFitError | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        """Of its adapter."""
        raise NotImplementedError

    @property
    def under_way(self) -> bool:
        """Whether it has steps to make."""
        done = self.loop.step >= self.loop.config.max_train_steps or self.loop.enough
        return self.failure is None and not self.stopped and not done


def complete_together(members: Sequence[Member], shared: Shared, on_step: OnStep | None) -> None:
    """What `Loop.complete` does, for all `members`: afterwards each has its ending, and its values in `own`.

    `on_step(name, step)`: a true value stops that run; a signal stops all.
    """
    before: dict[Member, float | None] = {}
    for member in members:
        with shared.worn(member.own):
            before[member] = member.loop.begin(member.resumed)
    started, first = time.perf_counter(), {member: member.loop.step for member in members}
    with stop_signals() as asked:
        try:
            _steps(members, shared, on_step, asked)
        except KeyboardInterrupt:
            for member in members:
                if not member.loop.between_steps:
                    member.loop.go_to(member.loop.good)
                member.stopped = member.under_way
        hurried = asked()
    seconds = time.perf_counter() - started
    for member in members:
        loop = member.loop
        if loop.step > first[member] and member.failure is None:
            loop.save()
        member.stopped = member.stopped or member.under_way
        ending = Ending(loop.step, loop.step, seconds, before[member], None, member.stopped, hurried, member.failure)
        with shared.worn(member.own):
            member.ending = loop.end(ending)


def _steps(members: Sequence[Member], shared: Shared, on_step: OnStep | None, asked: Callable[[], bool]) -> None:
    started = time.perf_counter()
    total = sum(member.loop.config.max_train_steps for member in members)
    with tqdm(total=total, initial=sum(m.loop.step for m in members), desc="training", unit="step") as bar:
        while (live := [member for member in members if member.under_way]) and not asked():
            for member, told in step_together(live, shared).items():
                if isinstance(told, SVFitError):
                    member.failure = told
                elif isinstance(told, Stepped):
                    done = replace(told, seconds=round(time.perf_counter() - started, 3))
                    with shared.worn(member.own):
                        member.loop.after(done)
                    if on_step is not None and on_step(member.name, done) and member.under_way:
                        member.stopped = True
            bar.n = sum(member.loop.step for member in members)
            bar.refresh()


def step_together(members: Sequence[Member], shared: Shared) -> dict[Member, Stepped | SVFitError | None]:
    """One optimizer step of every run; None: it went back, from numbers that were bad; SVFitError: it failed."""
    count = members[0].loop.config.gradient_accumulation_steps
    shares = {member: member.loop.start_step() for member in members}
    losses: dict[Member, list[Losses]] = {member: [] for member in members}
    bad: dict[Member, NotFinite] = {}
    for micro in range(count):
        going = [member for member in members if member not in bad]
        with ExitStack() as accumulating:
            for member in going:
                accumulating.enter_context(member.loop.accelerator.accumulate(*member.loop.modules))
            batch = {member: member.loop.objective.draws(member.loop.step * count + micro) for member in going}
            for member, loss in add_gradients(batch, shared).items():
                try:
                    told = member.loop.checked(loss)
                    with shared.worn(member.own):
                        losses[member].append(member.loop.held_to_base(member.loop.step * count + micro, told))
                    member.loop.descend()
                except NotFinite as error:
                    bad[member] = error
    return {member: _ended(member.loop, shares[member], losses[member], bad.get(member)) for member in members}


def _ended(loop: Loop, share: float, losses: list[Losses], bad: NotFinite | None) -> Stepped | SVFitError | None:
    try:
        if bad is None:
            return loop.end_step(share, losses)
        loop.roll_back(str(bad))
        return None
    except SVFitError as error:
        return error


def add_gradients(batch: dict[Member, list[Draw]], shared: Shared) -> dict[Member, Loss]:
    """Adds the gradient of each run's loss on its examples to its values; the losses.

    A loss is linear in the errors of its examples.  So their factors are known before the errors are, and those
    that go through the denoiser together may go through it backward at once.
    """
    draws = [draw for own in batch.values() for draw in own]
    members = [member for member, own in batch.items() for _ in own]
    factors = torch.cat([_factors(member.loop, own) for member, own in batch.items()])  # (all,)
    errors = factors.new_zeros(len(draws), device=members[0].loop.objective.device, dtype=torch.float32)
    for places in by_shape(draws):
        with shared.each([members[place].own for place in places]):
            found = members[0].loop.objective.equal_errors([draws[place] for place in places])  # (batch,)
            (found * factors[places].to(found)).sum().backward()
        errors = errors.to(found).index_copy(0, torch.tensor(places, device=found.device), found.detach())
    split = errors.split([len(own) for own in batch.values()])
    return {
        member: member.loop.objective.loss_of(own, part)
        for (member, own), part in zip(batch.items(), split, strict=True)
    }


def _factors(loop: Loop, draws: list[Draw]) -> Tensor:
    """By how much what is gone down along grows with the error of each of `draws`, (batch,), on the CPU."""
    errors = torch.ones(len(draws), dtype=torch.float64, requires_grad=True)
    (factors,) = torch.autograd.grad(loop.objective.loss_of(draws, errors).total, errors)
    return factors * loop.gradient_scale()
