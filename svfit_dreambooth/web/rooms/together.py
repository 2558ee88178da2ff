"""One batch for several people: a picture of each of their orders, with their own prompts, seeds and adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.loaded import Loaded
from svfit_dreambooth.web.rooms.tickets import Ticket


def paint_together(model: Any, loaded: Loaded, tickets: Sequence[Ticket]) -> None:
    """Paints the next picture of each in one call; where that cannot be, all of them are to be painted alone.

    It stops when the first one is cancelled; a picture for another one who is gone meanwhile is dropped.  In a larger
    batch sums are added up in another order, so a picture differs from the one painted alone by about 1e-4 in float32.
    """
    from svfit_dreambooth.adapter.source import distinct_names
    from svfit_dreambooth.painting.batches import paint_batch
    from svfit_dreambooth.painting.generate import picture_settings
    from svfit_dreambooth.painting.numbers import rescaling
    from svfit_dreambooth.painting.picture import Picture

    def on_step(step: int, of: int) -> bool:
        for ticket in batch:
            if not ticket.is_set():
                ticket.tell("step", step=step, of=of)
        return tickets[0].cancelled.is_set()

    try:
        samples, numbers = _samples(model, loaded, tickets)
        batch = [t for t, sample in zip(tickets, samples, strict=True) if sample.kind == samples[0].kind]
        painted = paint_batch(
            model,
            [sample for sample in samples if sample.kind == samples[0].kind],
            on_step,
            **{name: value for name, value in numbers.items() if not name.startswith("guidance")},
            **rescaling(numbers["guidance_rescale"]),
        )
    except (SVFitError, RuntimeError, MemoryError):  # whose fault it is shows when each has a turn alone
        for ticket in tickets:
            ticket.alone = True
        return
    for ticket, (image, filtered) in zip(batch, painted or [], strict=False):
        if not ticket.is_set():
            order, (cell, number) = ticket.order, ticket.left[0]
            names = distinct_names(
                path.stem for path, _ in order.adapters
            )  # not those on the pipeline, which has others too
            settings = picture_settings(
                model,
                order.prompt,
                order.negative_prompt or None,
                order.seed + number,
                dict(zip(names, order.strengths(cell), strict=True)),
                prompt_weights=False,
                **numbers,
            )
            ticket.done(Picture(image, settings, filtered))


def _samples(model: Any, loaded: Loaded, tickets: Sequence[Ticket]) -> tuple[list[Any], dict[str, Any]]:
    """What is painted for each, and the numbers that are the same for all."""
    from svfit_dreambooth.painting.batches import Sample, read_words
    from svfit_dreambooth.painting.numbers import check_numbers, rescale_for

    files: dict[Path, Any] = {path: adapter for ticket in tickets for path, adapter in ticket.adapters}
    names = loaded.exchange(model, list(files.items()), tickets[0].order.allow_other_base)
    called = dict(zip(files, names, strict=True))
    own = tickets[0].order.settings(tickets[0].left[0][0])
    steps, guidance = own["num_inference_steps"], own["guidance_scale"]
    steps = model.num_inference_steps if steps is None else steps
    guidance = model.guidance_scale if guidance is None else guidance
    rescale = rescale_for(model, model.pipeline, own["guidance_rescale"])
    height, width = own["height"] or model.resolution, own["width"] or model.resolution
    samples = []
    for ticket in tickets:
        order, (cell, number) = ticket.order, ticket.left[0]
        seed = order.seed + number
        check_numbers(model, 1, seed, steps, guidance, height, width)
        mix = dict(zip((called[path] for path, _ in order.adapters), order.strengths(cell), strict=True))
        words, skipped = read_words(
            model, order.prompt, order.negative_prompt or None, mix, guidance, clip_skip=own["clip_skip"]
        )
        samples.append(Sample(words, seed, mix, skipped))
    numbers = {"num_inference_steps": steps, "guidance_scale": guidance, "guidance_rescale": rescale}
    return samples, numbers | {"height": height, "width": width}
