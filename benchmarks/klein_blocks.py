"""A training step of FLUX.2-klein-4B, as far as a CPU can tell: SVFit against PEFT's LoRA of rank 32.

    OMP_NUM_THREADS=1 python benchmarks/klein_blocks.py [--tokens 256] [--rounds 3] [--quantize int8] [--output F.json]

Time: one double and one single block of the real width, with random weights and bases, on which time does not depend;
forward and backward, all in one process on the same weights, taking turns, in seconds of the process's own clock, as
other work may share the machine.  Ratios are of medians; their spread is that of the rounds' own ratios.
Memory: the whole network of 5 and 20 blocks in bf16 on tensors without numbers: directions, what the optimizer holds of
trained values, and what is kept for the backward pass, each less what the frozen network keeps.

    frozen   forward, and backward down to the first adapted layer: what no method can go below
    lora     PEFT LoRA r=32 on the attention projections, in the type of the network
    400      SVFit with 400 values in each of them, as training takes unasked
    full     SVFit with all of them
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svfit_dreambooth.bases.flux2 import FLUX2, Flux2Klein
from svfit_dreambooth.method.one_sided import basis_numbers
from svfit_dreambooth.method.targets import apply_svfit, find_projections
from svfit_dreambooth.training.counting import default_dtype, kept_for_backward

METHODS = ("frozen", "lora", "400", "full")
SIZE = {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
BLOCKS = {"num_layers": 5, "num_single_layers": 20}
LORA_RANK = 32


class Lora(nn.Module):
    """y = layer(x) + B A x, as PEFT computes it without dropout."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.lora_A = nn.Linear(layer.in_features, LORA_RANK, bias=False)
        self.lora_B = nn.Linear(LORA_RANK, layer.out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input) + self.lora_B(self.lora_A(input))


def adapt(network: nn.Module, method: str, ranks: dict[str, int]) -> list[nn.Parameter]:
    """Puts what `method` trains into a frozen `network`; returns it."""
    network.requires_grad_(False)
    if method == "frozen":
        return []
    if method == "lora" and isinstance(network.x_embedder.weight, FakeTensor):  # which PEFT cannot move
        for parent, attribute, layer in find_projections(network, list(ranks)).values():
            parent.register_module(attribute, Lora(layer))
        return [p for name, p in network.named_parameters() if "lora_" in name]
    if method == "lora":
        inject_adapter_in_model(LoraConfig(r=LORA_RANK, target_modules=list(ranks)), network)
        trained = [p for name, p in network.named_parameters() if "lora_" in name]
        for parameter in trained:
            parameter.data = parameter.data.to(network.dtype)
        return trained
    basis = {}
    for name, (_, _, layer) in find_projections(network, list(ranks)).items():
        out, into = layer.out_features, layer.in_features
        rank = ranks[name] if method == "full" else min(400, ranks[name])
        spectrum = torch.linspace(2, 0, rank)  # of a random matrix, about: in units of its root mean square
        if not layer.weight.is_meta:
            spectrum = spectrum * (max(out, into) / (3 * into)) ** 0.5
        basis[name] = (torch.randn(out, rank) / out**0.5, spectrum, torch.randn(rank, into) / into**0.5)
    return list(apply_svfit(network, target_modules=list(basis), basis=basis).values())


def ranks_of(network: nn.Module) -> dict[str, int]:
    found = find_projections(network, None, FLUX2)
    return {name: min(layer.out_features, layer.in_features) for name, (_, _, layer) in found.items()}


def call(network: nn.Module, tokens: int, text: int) -> Tensor:
    """The network's answer to random input of so many tokens, half of it text by default."""
    side = int((tokens - text) ** 0.5)
    image = side * side
    ids = torch.zeros(1, image, 4), torch.zeros(1, text, 4)
    return network(
        hidden_states=torch.randn(1, image, 128, dtype=network.dtype),
        encoder_hidden_states=torch.randn(1, text, 7680, dtype=network.dtype),
        timestep=torch.full((1,), 0.5, dtype=network.dtype),
        img_ids=ids[0],
        txt_ids=ids[1],
        guidance=None,
        return_dict=False,
    )[0]


def shared_copy(network: nn.Module) -> nn.Module:
    """A copy whose parameters are the same objects."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters()})


def quantized(network: nn.Module, kind: str) -> nn.Module:
    from svfit_dreambooth.bases.quantizing import quantize_layers

    blocks = Flux2Klein.checkpointed
    names = [
        f"{path}.{inner}"
        for path, block in network.named_modules()
        if isinstance(block, blocks)
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    quantize_layers(network, names, kind)
    return network


def step(network: nn.Module, trained: list[nn.Parameter], tokens: int) -> float:
    """Seconds of one forward and backward pass."""
    torch.manual_seed(0)
    start = time.process_time()
    # something must want a gradient from the first block on, also without anything trained
    with_gradient = network.x_embedder.register_forward_hook(lambda *args: args[2].requires_grad_())
    call(network, tokens, tokens // 2).square().mean().backward()
    with_gradient.remove()
    for parameter in trained:
        parameter.grad = None
    return time.process_time() - start


def measure_time(tokens: int, rounds: int, kind: str | None) -> dict[str, list[float]]:
    torch.manual_seed(0)
    network = Flux2Transformer2DModel(num_layers=1, num_single_layers=1, **SIZE)
    ranks = ranks_of(network)
    if kind is not None:
        network = quantized(network, kind)
    contestants = {}
    for method in METHODS:
        own = shared_copy(network)
        contestants[method] = own, adapt(own, method, ranks)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(rounds + 1):
        for method in METHODS if number % 2 else METHODS[::-1]:
            taken = step(*contestants[method], tokens)
            if number:  # the first round warms up
                seconds[method].append(taken)
                print(f"round {number}, {method}: {taken:.2f} s", flush=True)
    return seconds


def measure_memory(side: int) -> dict[str, float]:
    """GiB beside the frozen network, of the whole model in bf16, at `side` pixels and 512 tokens of text."""
    found = {}
    for method in METHODS:
        with FakeTensorMode(), default_dtype(torch.bfloat16):
            network = Flux2Transformer2DModel(**BLOCKS, **SIZE).train()
            ranks = ranks_of(network)
            shapes = [tuple(layer.weight.shape) for _, _, layer in find_projections(network, list(ranks)).values()]
            trained = adapt(network, method, ranks)
            network.x_embedder.register_forward_hook(lambda *args: args[2].requires_grad_())
            with kept_for_backward(network, (), False) as count:
                call(network, (side // 16) ** 2 + 512, 512)
        rank = {"400": 400, "full": 10**9}.get(method, 0)
        numbers = sum(basis_numbers(*shape, min(rank, *shape)) for shape in shapes)
        # AdamW: value, gradient, two moments in float32
        found[method] = (count() + 2 * numbers + 16 * sum(p.numel() for p in trained)) / 2**30
    return {method: value - found["frozen"] for method, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantize", choices=("int8", "fp8", "nf4"))
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--time", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result: dict[str, object] = {"options": {k: str(v) for k, v in vars(options).items()}}
    if options.memory:
        result["memory beside the frozen network, GiB"] = {
            f"{side} px": {k: round(v, 2) for k, v in measure_memory(side).items()} for side in (512, 1024)
        }
    if options.time:
        seconds = measure_time(options.tokens, options.rounds, options.quantize)
        medians = {method: statistics.median(taken) for method, taken in seconds.items()}
        ratios = {
            method: [a / b for a, b in zip(taken, seconds["lora"], strict=True)] for method, taken in seconds.items()
        }
        result["seconds"] = seconds
        result["step over LoRA's"] = {
            method: {
                "of medians": round(medians[method] / medians["lora"], 3),
                "least": round(min(own), 3),
                "most": round(max(own), 3),
            }
            for method, own in ratios.items()
        }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
