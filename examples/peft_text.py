"""A text classifier that tells five libraries by their docstrings learns to tell modules of Python itself.

    python examples/peft_text.py

The texts are docstrings, read from the installed sources of numpy, Pillow, huggingface_hub, torch.nn and diffusers'
schedulers, and of six packages of Python's standard library: real sentences that every machine with this project
has.  The model is a small BERT of transformers over their words, trained here first.  Prints the table of
docs/peft.md; figures move a little with the versions that are installed.
"""

import ast
import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from comparison import Data, accuracy, compare, fit, methods
from transformers import BertConfig, BertForSequenceClassification

SITE, STANDARD = (Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib"))
LIBRARIES = [SITE / name for name in ("numpy", "PIL", "huggingface_hub", "torch/nn", "diffusers/schedulers")]
MODULES = [STANDARD / name for name in ("asyncio", "email", "logging", "unittest", "multiprocessing", "importlib")]
LENGTH = 16  # words of a text that are read
TEXTS = 600  # of a class at most
PAD, UNKNOWN = 0, 1


def texts(folder: Path) -> list[list[str]]:
    """The words of the first paragraph of every docstring under `folder`; the names that give it away are left out."""
    found = set()
    for path in sorted(folder.rglob("*.py")):
        if any(part in ("test", "tests") for part in path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                paragraph = (ast.get_docstring(node) or "").split("\n\n")[0].lower()
                words = [word for word in re.findall(r"[a-z]+|[^\sa-z]", paragraph) if word not in folder.parts]
                if len(words) >= 5:
                    found.add(tuple(words[:LENGTH]))
    return [list(words) for words in sorted(found)][:: max(1, len(found) // TEXTS)]


def encode(classes: list[list[list[str]]], vocabulary: dict[str, int]) -> Data:
    """Token ids and mask (n, LENGTH) of the texts of every class."""
    rows = [[vocabulary.get(word, UNKNOWN) for word in words] for group in classes for words in group]
    ids = torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])
    labels = torch.tensor([label for label, group in enumerate(classes) for _ in group])
    return Data({"input_ids": ids, "attention_mask": (ids != PAD).long()}, labels)


def main() -> None:
    known = [texts(folder) for folder in LIBRARIES]
    counted = Counter(word for group in known for words in group for word in words)
    vocabulary = {word: index for index, (word, _) in enumerate(counted.most_common(1500), start=UNKNOWN + 1)}
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary) + 2,
            max_position_embeddings=LENGTH,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=len(LIBRARIES),
            pad_token_id=PAD,
        )
    )
    data = encode(known, vocabulary)
    train, test = data.split(len(data.labels) * 4 // 5)
    fit(base, train, 400, [(list(base.parameters()), 2e-3)], batch_size=64, seed=0)
    print(f"base, {len(LIBRARIES)} libraries: {accuracy(base, test):.1%} of {len(test.labels)} texts", flush=True)
    new = encode([texts(folder) for folder in MODULES], vocabulary)
    print(f"{len(new.labels)} texts of {len(MODULES)} modules", flush=True)
    print("\n".join(compare(base, methods(lora_rank=8, tinylora_values=64), new, sizes=(400, 300), steps=80)))


if __name__ == "__main__":
    main()
