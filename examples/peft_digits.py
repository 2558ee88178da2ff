"""An image classifier that knows the digits 0 to 4 learns 5 to 9, by SVFit and by others.

    python examples/peft_digits.py

The images are the 1,797 handwritten digits that scikit-learn ships, 8x8 pixels (pip install scikit-learn); the model
is a small ViT of transformers, trained here first.  Prints the table of docs/peft.md.
"""

import torch
from comparison import Data, accuracy, compare, fit, methods
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification


def digits(classes: range) -> Data:
    """The digits in `classes`, labelled from 0 on; pixels (n, 1, 8, 8) in [-1, 1]."""
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    pixels = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    chosen = (labels >= classes.start) & (labels < classes.stop)
    return Data({"pixel_values": pixels[chosen]}, labels[chosen] - classes.start)


def main() -> None:
    torch.manual_seed(0)
    base = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=5,
        )
    )
    train, test = digits(range(5)).split(700)
    fit(base, train, 300, [(list(base.parameters()), 2e-3)], batch_size=64, seed=0)
    print(f"base, digits 0 to 4: {accuracy(base, test):.1%}")
    chosen = methods(lora_rank=8, tinylora_values=64)
    print("\n".join(compare(base, chosen, digits(range(5, 10)), sizes=(100, 200), steps=80)))


if __name__ == "__main__":
    main()
