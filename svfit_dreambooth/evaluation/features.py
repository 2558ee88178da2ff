"""The networks that see for the metrics: DINO and CLIP where their weights are given, the judge where the base has one.

Whatever they are, they give rows of features for `metrics.py`; nothing else depends on which ones they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from svfit_dreambooth.bases.hub import reason_of
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.reference import open_judge

See = Callable[[Sequence[Image.Image]], Tensor]


@dataclass
class Features:
    """Functions from pictures or texts to rows of features (n, d); None where no network was given for it."""

    subject: See | None = None  # what a subject looks like: DINO, else CLIP, or the judge's identity embedding
    picture: See | None = None  # what a picture shows, in the space shared with texts: CLIP or the judge
    text: Callable[[Sequence[str]], Tensor] | None = None  # what a text asks for, in that space
    attributes: Callable[[Sequence[Image.Image]], list[dict[str, str]]] | None = None  # the judge's names of things

    @property
    def any(self) -> See | None:
        """Whatever sees pictures, the space shared with texts first."""
        return self.picture or self.subject


def open_features(
    base_model: str, dino_path: str | None = None, clip_path: str | None = None, device: str | torch.device = "cpu"
) -> Features:
    """The networks that were asked for (folders or hub ids), else the judge of `base_model`, else none.

    Raises SVFitError for weights that cannot be opened.
    """
    features = Features()
    if clip_path is not None:
        model, processor = _open("CLIPModel", clip_path, device)
        features.subject = features.picture = partial(_clip_pictures, model, processor)
        features.text = partial(_clip_texts, model, processor)
    if dino_path is not None:
        model, processor = _open("AutoModel", dino_path, device)
        features.subject = partial(_dino_pictures, model, processor)
    if features.any is None and (judge := open_judge(base_model, str(device))) is not None:
        features = Features(judge.identity_features, judge.image_features, judge.text_features, judge.attributes)
    return features


def _open(kind: str, path: str, device: str | torch.device) -> tuple[Any, Any]:
    import transformers

    reader = transformers.AutoProcessor if kind == "CLIPModel" else transformers.AutoImageProcessor
    try:
        model = getattr(transformers, kind).from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        processor = reader.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise SVFitError(f"the weights {path} cannot be opened as a {kind}: {reason_of(error, path)}.") from error
    return model.to(device).eval(), processor


@torch.no_grad()
def _in_batches(see: Callable[[Sequence[Any]], Tensor], items: Sequence[Any], size: int = 16) -> Tensor:
    return torch.cat([see(items[start : start + size]).float().cpu() for start in range(0, len(items), size)])


def _dino_pictures(model: Any, processor: Any, images: Sequence[Image.Image]) -> Tensor:
    def see(batch: Sequence[Image.Image]) -> Tensor:
        inputs = processor(images=[image.convert("RGB") for image in batch], return_tensors="pt").to(model.device)
        return model(**inputs).last_hidden_state[:, 0]  # the class token, (n, d), as in Ruiz et al., 2022

    return _in_batches(see, images)


def _clip_pictures(model: Any, processor: Any, images: Sequence[Image.Image]) -> Tensor:
    def see(batch: Sequence[Image.Image]) -> Tensor:
        inputs = processor(images=[image.convert("RGB") for image in batch], return_tensors="pt").to(model.device)
        features = model.get_image_features(**inputs)
        return getattr(features, "pooler_output", features)  # a tensor in some versions of transformers

    return _in_batches(see, images)


def _clip_texts(model: Any, processor: Any, texts: Sequence[str]) -> Tensor:
    def read(batch: Sequence[str]) -> Tensor:
        inputs = processor(text=list(batch), padding=True, truncation=True, return_tensors="pt").to(model.device)
        features = model.get_text_features(**inputs)
        return getattr(features, "pooler_output", features)

    return _in_batches(read, texts)
