"""SVDiff's spectral shifts as adapters, against SVDiff's own formula written out here."""

import pytest
import torch
from conftest import tiny_pipeline
from safetensors.torch import save_file
from test_loading import paint

from svfit_dreambooth import load_adapter, read_adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import canonical_weight
from svfit_dreambooth.method.targets import canonical_name, matrix_layers
from svfit_dreambooth.sharing.svdiff import import_svdiff


def canonical_pipeline():
    """One whose weights lose nothing in their canonical form, so that both decompositions are the same."""
    pipeline = tiny_pipeline()
    for model in (pipeline.unet, pipeline.text_encoder):
        for _, _, layer in matrix_layers(model).values():
            layer.weight.data = canonical_weight(layer.weight).float().view(layer.weight.shape)
    return pipeline


def svdiff_file(model, path, scale=0.3, prefix="", everything=False):
    generator = torch.Generator().manual_seed(0)
    whole = ((canonical_name(model, name), module) for name, module in model.named_modules())
    modules = whole if everything else ((n, e[2]) for n, e in matrix_layers(model).items())
    tensors = {}
    for name, module in modules:
        weight = getattr(module, "weight", None)
        if weight is not None:
            values = min(weight.shape[0], weight[0].numel()) if weight.ndim > 1 else 1
            tensors[f"{prefix}{name}.delta"] = scale * torch.randn(values, generator=generator)
    save_file(tensors, path)
    return tensors


@torch.no_grad()
def apply_svdiff(model, tensors, prefix=""):
    """W' = U diag(relu(S + delta)) Vh for every matrix, convolutions as (out, in * h * w) (Han et al. 2023, equation 3)."""
    for name, (_, _, layer) in matrix_layers(model).items():
        U, S, Vh = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
        moved = U @ torch.diag(torch.relu(S + tensors[f"{prefix}{name}.delta"])) @ Vh
        layer.weight.copy_(moved.view(layer.weight.shape))


def test_both_files_of_a_folder_paint_as_svdiff_does(tmp_path):
    base = BaseModel("tiny", canonical_pipeline())
    before = paint(base.pipeline)
    unet = svdiff_file(base.pipeline.unet, tmp_path / "spectral_shifts.safetensors")
    text = svdiff_file(base.pipeline.text_encoder, tmp_path / "spectral_shifts_te.safetensors", 0.1)
    result = import_svdiff(tmp_path, base)
    assert result.lost < 1e-3 and not result.unfit
    theirs = canonical_pipeline()
    apply_svdiff(theirs.unet, unet)
    apply_svdiff(theirs.text_encoder, text)
    load_adapter(base.pipeline, result.adapter)
    expected = paint(theirs)
    assert (expected - before).abs().max() > 0.02
    assert (paint(base.pipeline) - expected).abs().max() < 1e-3


def test_singular_values_do_not_go_below_zero(tmp_path):
    base = BaseModel("tiny", canonical_pipeline())
    name, (_, _, layer) = next(iter(matrix_layers(base.pipeline.unet).items()))
    S = torch.linalg.svdvals(layer.weight.flatten(1))
    save_file({f"{name}.delta": -S - 1}, tmp_path / "x.safetensors")
    shift = import_svdiff(tmp_path / "x.safetensors", base).adapter.shifts[f"unet.{name}"]
    assert torch.allclose(shift, -S, atol=1e-5)


def test_an_uncanonical_base_gets_the_closest_and_is_told_what_is_lost(tmp_path):
    base = BaseModel("tiny", tiny_pipeline())
    tensors = svdiff_file(base.pipeline.unet, tmp_path / "spectral_shifts.safetensors")
    result = import_svdiff(tmp_path, base)
    assert 0 < result.lost < 0.3 and "is lost" in result.lines()[0]
    name, (_, _, layer) = next(iter(matrix_layers(base.pipeline.unet).items()))
    U, _, Vh = torch.linalg.svd(canonical_weight(layer.weight).double(), full_matrices=False)
    u, s, vh = torch.linalg.svd(layer.weight.flatten(1).double(), full_matrices=False)
    change = u @ torch.diag(torch.relu(s + tensors[f"{name}.delta"]) - s) @ vh
    closest = torch.diagonal(U.mT @ change @ Vh.mT)
    assert torch.allclose(result.adapter.shifts[f"unet.{name}"].double(), closest, atol=1e-4)


def test_norms_are_refused_or_left_out_when_asked(tmp_path):
    base = BaseModel("tiny", canonical_pipeline())
    svdiff_file(base.pipeline.unet, tmp_path / "spectral_shifts.safetensors", everything=True)
    with pytest.raises(SVFitError, match=r"do not fit an adapter \(\d+ GroupNorm, \d+ LayerNorm\).*partial"):
        import_svdiff(tmp_path, base)
    result = import_svdiff(tmp_path, base, partial=True)
    assert len(result.adapter.shifts) == len(matrix_layers(base.pipeline.unet))
    assert "unet.conv_norm_out" in result.unfit and "not taken over" in result.lines()[1]
    load_adapter(base.pipeline, result.adapter)


def test_the_text_encoder_as_trainers_write_it(tmp_path):
    """With embeddings, norms, and a token that some add: its layers are taken over, the rest is named with its share."""
    base = BaseModel("tiny", canonical_pipeline())
    file = tmp_path / "spectral_shifts_te.safetensors"
    tensors = svdiff_file(base.pipeline.text_encoder, file, everything=True)
    assert "text_model.embeddings.token_embedding.delta" in tensors
    save_file(tensors | {"modifier_tokens.<new1>": torch.ones(24)}, file)
    with pytest.raises(
        SVFitError, match=r"\(2 Embedding, \d+ LayerNorm, 1 added token\), \d+\.\d% of the whole change"
    ):
        import_svdiff(file, base)
    result = import_svdiff(tmp_path, base, partial=True)
    layers = matrix_layers(base.pipeline.text_encoder)
    assert set(result.adapter.shifts) == {f"text_encoder.{name}" for name in layers}
    linear = sum(tensors[f"{name}.delta"].double().square().sum() for name in layers)
    whole = sum(delta.double().square().sum() for delta in tensors.values())
    assert result.left_out == pytest.approx((1 - linear / whole).sqrt().item()) and "added token" in result.lines()[1]
    theirs = canonical_pipeline()
    apply_svdiff(theirs.text_encoder, tensors)
    before = paint(base.pipeline)
    load_adapter(base.pipeline, result.adapter)
    expected = paint(theirs)
    assert (before - expected).abs().max() > 0.02
    assert (paint(base.pipeline) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"mid.to_q.delta": torch.ones(3)}, "changes mid.to_q, which the unet of tiny lacks"),
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.delta": torch.ones(99)}, "another base model"),
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.delta": torch.full((16,), torch.nan)}, "finite"),
        ({"conv_in.weight": torch.ones(3)}, "safetensors is no SVDiff file"),
        ({"lora_unet_x.lora_down.weight": torch.ones(3), "lora_unet_x.alpha": torch.ones(1)}, "is a LoRA, no SVDiff"),
        ({"lora_unet_x.hada_w1_a": torch.ones(3), "lora_unet_x.alpha": torch.ones(1)}, "is a LoHa, no SVDiff file"),
        ({"lora_unet_x.lokr_w1": torch.ones(3), "lora_unet_x.alpha": torch.ones(1)}, "is a LoKr, no SVDiff file"),
        ({"conv_in.delta": torch.zeros(16)}, "nothing in .* fits an adapter"),
    ],
)
def test_refusals(tmp_path, tensors, sentence):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SVFitError, match=sentence):
        import_svdiff(tmp_path / "x.safetensors", BaseModel("tiny", tiny_pipeline()), partial=True)


def test_no_file(tmp_path):
    with pytest.raises(SVFitError, match="holds none of"):
        import_svdiff(tmp_path, BaseModel("tiny", tiny_pipeline()))
    with pytest.raises(SVFitError, match="There is no file"):
        import_svdiff(tmp_path / "x.safetensors", BaseModel("tiny", tiny_pipeline()))


def test_read_as_an_adapter_it_is_sent_to_its_import(tmp_path):
    svdiff_file(tiny_pipeline("kl").unet, tmp_path / "svdiff.safetensors")
    with pytest.raises(SVFitError, match=r"holds spectral shifts of SVDiff .*the command import turns it into one"):
        read_adapter(tmp_path / "svdiff.safetensors")
