"""The page that introduces an adapter on the Hugging Face Hub, made from its file and its run."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.adapter.licences import OF_THE_BASE, of_base
from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.evaluation.measures import in_words, table

HUB_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # the hub's words for licences look so


def model_card(
    adapter: Adapter,
    *,
    title: str,
    file_name: str,
    file_bytes: int,
    repository: str,
    pictures: Sequence[str] = (),
    figures: Mapping[str, Mapping[str, float | None]] | None = None,
    licence: str | None = None,
) -> str:
    """The text of README.md.

    `pictures`: file names beside the card.  `figures`: row -> measure -> value, as the end of a run reports them.
    `licence`: the hub's word for it; None takes what a person wrote into the file, else that of the base where known.
    """
    base, _, revision = adapter.base_model.partition("@")
    note = adapter.metadata.get("modelspec.license", OF_THE_BASE)
    known = of_base(base)
    of_the_base = known.hub if known else None
    licence = licence or (of_the_base if note.startswith(OF_THE_BASE) else note)
    on_hub = base.count("/") == 1
    made = (
        f"`{file_name}`, {file_bytes / 1000:,.0f} kB, is an adapter for {_base_link(base, revision, on_hub)}, made with "
        f"SVFit DreamBooth: {_origin(adapter)} ([SVFit, Sun et al. 2024](https://arxiv.org/abs/2409.05926))."
    )
    parts = [f"# {_line(title)}", made]
    if "modelspec.author" in adapter.metadata:
        parts.append(f"Author: {_line(adapter.metadata['modelspec.author'])}")
    if adapter.instance_prompt:
        parts.append(f"The words for its subject: {_code(adapter.instance_prompt)}")
    parts += [f"![Pictures of {_line(title)}]({name})" for name in pictures]
    parts += ["## Use", _usage(adapter, base, revision, on_hub, repository)]
    parts += ["## Training", _settings(adapter)]
    if figures:
        parts += ["## Figures", _figures(figures)]
    parts += ["## Licence and likeness", _licence(licence, of_the_base, base, on_hub), CONSENT]
    data = _card_data(adapter, base if on_hub else None, licence, pictures)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


CONSENT = (
    "If the subject is a person, this adapter is a likeness of that person: it may be shared and used only with that "
    "person's consent.  Whoever finds their own likeness here without it can ask for removal under *Community*."
)


def _origin(adapter: Adapter) -> str:
    """What was done to get it."""
    values, words = f"{sum(adapter.ranks.values()):,} singular values", len(adapter.learned_words)
    if "imported_from" in adapter.training:
        return f"it changes {values} of its weights, brought over from {_line(str(adapter.training['imported_from']))}"
    if "combined_from" in adapter.metadata:
        return f"it changes {values} of its weights, the sum of what other adapters change"
    learnt = f" and the embedding of {'a word' if words == 1 else f'{words} words'}" * bool(words)
    return f"only {values} of its weights{learnt} were trained"


def _card_data(adapter: Adapter, base: str | None, licence: str | None, pictures: Sequence[str]) -> ModelCardData:
    """What the hub itself reads."""
    more: dict[str, Any] = {}
    if not HUB_LICENCE.fullmatch(licence or ""):
        more["license_name"], licence = licence or "that-of-the-base-model", "other"
    if base is not None:
        more |= {"base_model": base, "base_model_relation": "adapter"}
    if adapter.instance_prompt:
        more["instance_prompt"] = adapter.instance_prompt
        if pictures:
            more["widget"] = [{"text": adapter.instance_prompt, "output": {"url": pictures[0]}}]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence,
        tags=["svfit", "dreambooth", "diffusers", "text-to-image"],
        **more,
    )


def _base_link(base: str, revision: str, on_hub: bool) -> str:
    at = f" at revision {_code(revision)}" if revision else ""
    return (f"[{base}](https://huggingface.co/{base})" if on_hub else f"the base model {_code(base)}") + at


def _usage(adapter: Adapter, base: str, revision: str, on_hub: bool, repository: str) -> str:
    if base == DEFAULT_BASE:
        opening = [
            "from svfit_dreambooth.bases.opening import open_base_model",
            "pipeline = open_base_model().pipeline",
        ]
    else:
        where = base if on_hub else f"path/to/{base}"
        at = f', revision="{revision}"' if revision else ""
        opening = [
            "from diffusers import DiffusionPipeline",
            f'pipeline = DiffusionPipeline.from_pretrained("{where}"{at})',
        ]
    prompt = " ".join((adapter.instance_prompt or "a photo").split()) + " on the beach"
    lines = [
        opening[0],
        "from svfit_dreambooth import load_adapter",
        "",
        opening[1],
        f'load_adapter(pipeline, "{repository}")',
        f"image = pipeline({json.dumps(prompt, ensure_ascii=False)}).images[0]",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _settings(adapter: Adapter) -> str:
    ranks = adapter.ranks.values()
    rows = {
        "trained values": f"{sum(ranks):,} in {len(ranks)} layers of {', '.join(adapter.components)}",
        "singular values a layer": f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}",
    }
    if adapter.learned_words:
        rows["learned words"] = ", ".join(word.word for word in adapter.learned_words)
    rows |= {name.replace("_", " "): value for name, value in adapter.training.items() if value is not None}
    return _table(["setting", "value"], [[name, str(value)] for name, value in rows.items()])


def _figures(figures: Mapping[str, Mapping[str, float | None]]) -> str:
    head, rows = table(list(figures.items()))
    return _table(in_words(head), [[cell or "-" for cell in row] for row in rows])


def _licence(licence: str | None, of_the_base: str | None, base: str, on_hub: bool) -> str:
    if licence:
        return (
            f"Licence: `{licence}`, which is that of the base model."
            if licence == of_the_base
            else f"Licence: {_code(licence)}.  The licence of the base model holds beside it."
        )
    where = f"[its page](https://huggingface.co/{base})" if on_hub else "the place where you got it"
    return f"An adapter is derived from its base model and shares its licence: see {where}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _line(text: str) -> str:
    """`text` on one line, with what Markdown or HTML would act on made plain."""
    text = " ".join(text.split())
    return text.replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*")


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'") + "`"
