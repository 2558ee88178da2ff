"""The pre-training pictures: rendered once into a memory-mapped file, captioned anew each time they are shown."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from toybox.world import Individual, Scene, caption, render, sample_individual, sample_scene, training_scenes

SHARD = 200  # scenes that one worker renders at a time


def rival_scenes(rng: np.random.Generator, count: int) -> Iterator[Scene]:
    """Yield fours: two individuals of the same kind and colour, each in two scenes. Any combination may occur."""
    for _ in range(count // 4):
        first = sample_individual(rng)
        second = sample_individual(rng, first.kind, first.colour)
        for individual in (first, first, second, second):
            yield sample_scene(rng, individual)


def render_shard(
    sample: Callable[[np.random.Generator, int], Iterator[Scene]], seed: int, shard: int, count: int, size: int
) -> tuple[np.ndarray, list[Scene]]:
    """`count` random scenes and their pictures, uint8 (count, size, size, 3); `seed` and `shard` decide them."""
    scenes = list(sample(np.random.default_rng((seed, shard)), count))
    return np.stack([np.asarray(render(scene, size)) for scene in scenes]), scenes


def render_dataset(
    folder: Path,
    count: int,
    seed: int = 0,
    size: int = 64,
    processes: int | None = None,
    sample: Callable[[np.random.Generator, int], Iterator[Scene]] = training_scenes,
) -> None:
    """Render `count` pictures of what `sample` yields into `folder`; a folder that is complete is left alone."""
    if (folder / "scenes.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pictures = np.lib.format.open_memmap(folder / "pictures.npy", "w+", np.uint8, (count, size, size, 3))
    starts = range(0, count, SHARD)
    # Workers are started afresh: a fork of a process in which torch has threads may hang.
    with (
        ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn")) as pool,
        open(folder / "scenes.partial", "w") as lines,
    ):
        jobs = [
            pool.submit(render_shard, sample, seed, number, min(SHARD, count - start), size)
            for number, start in enumerate(starts)
        ]
        for start, job in zip(starts, tqdm(jobs, desc="render", unit="shard", mininterval=5), strict=True):
            shard, scenes = job.result()
            pictures[start : start + len(shard)] = shard
            lines.writelines(json.dumps(asdict(scene)) + "\n" for scene in scenes)
    pictures.flush()
    os.replace(folder / "scenes.partial", folder / "scenes.jsonl")  # last, so that its presence means "complete"


def load_pictures(folder: Path) -> np.ndarray:
    """The rendered pictures, uint8 (count, size, size, 3), mapped from the disk."""
    return np.load(folder / "pictures.npy", mmap_mode="r")


def load_scenes(folder: Path) -> list[Scene]:
    """The scenes of the rendered pictures, in the same order."""
    with open(folder / "scenes.jsonl") as lines:
        return [scene_from_dict(json.loads(line)) for line in lines]


def scene_from_dict(values: dict) -> Scene:
    """The inverse of `dataclasses.asdict` for a scene."""
    return Scene(**{**values, "individual": Individual(**values["individual"])})


def as_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (batch, height, width, 3) to float32 in [-1, 1], (batch, 3, height, width)."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def batch_indices(step: int, batch_size: int, count: int, seed: int = 0) -> np.ndarray:
    """The examples of a step, (batch_size,): each epoch is a new shuffle, and resuming needs no state but `step`."""
    per_epoch = max(1, count // batch_size)
    epoch, position = divmod(step, per_epoch)
    if (seed, epoch, count) not in _SHUFFLES:
        _SHUFFLES.clear()
        _SHUFFLES[seed, epoch, count] = np.random.default_rng((seed, epoch)).permutation(count)
    return np.sort(_SHUFFLES[seed, epoch, count][position * batch_size : (position + 1) * batch_size])


_SHUFFLES: dict[tuple[int, int, int], np.ndarray] = {}


def draw_captions(scenes: Sequence[Scene], rng: np.random.Generator, dropout: float = 0.0) -> list[str]:
    """A fresh caption of each scene; the share `dropout` of them is left empty, for classifier-free guidance."""
    return ["" if rng.random() < dropout else caption(scene, rng) for scene in scenes]


def caption_corpus(scenes: Sequence[Scene], seed: int = 0) -> Iterator[str]:
    """One caption of each scene, to learn a vocabulary from."""
    rng = np.random.default_rng(seed)
    return (caption(scene, rng) for scene in scenes)
