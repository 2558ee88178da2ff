"""The finished runs of a comparison, one JSON file each, and which runs are still to be made."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

SEEDS = (0, 1, 2)
TUNING_SEED = 100
MOST_RATES = 9  # of one sweep


@dataclass(frozen=True)
class Job:
    """A run to be made."""

    method: str
    subject: str
    seed: int
    rate: float

    @property
    def file_name(self) -> str:
        return f"{self.method.replace('/', '_of_')}-{self.subject}-{self.seed}-{self.rate:g}.json"


@dataclass
class Record:
    """A run that was made."""

    method: str
    subject: str
    seed: int
    rate: float
    values: int  # trained numbers
    file_bytes: int  # of a safetensors file of them in float16
    step_seconds: float  # mean over the run, on whatever else the machine did
    readings: dict[str, dict[str, Any]] = field(default_factory=dict)  # step -> Scores by name, and the loss

    @property
    def job(self) -> Job:
        return Job(self.method, self.subject, self.seed, self.rate)

    def reading(self, step: int) -> dict[str, Any]:
        return self.readings[str(step)]

    @property
    def last(self) -> dict[str, Any]:
        return self.readings[max(self.readings, key=int)]

    def score(self) -> float:
        """By which rates are chosen: likeness plus fit to the prompts less drift; below all if numbers went bad.

        The fit is the share of right pictures where a judge names things, else the cosine with the prompts.
        """
        fit = self.last["prompt"] if self.last["right"] is None else self.last["right"]
        parts = [self.last["subject"], fit, self.last["drift"]]
        return parts[0] + parts[1] - parts[2] if all(part is not None for part in parts) else -math.inf


def read_records(folder: Path) -> list[Record]:
    """Those in `folder`, and those that were packed into <folder>.jsonl."""
    packed = folder.with_suffix(".jsonl")
    texts = packed.read_text().splitlines() if packed.exists() else []
    texts += [path.read_text() for path in sorted(folder.glob("*.json"))]
    records = [Record(**json.loads(text)) for text in texts]
    return list({record.job: record for record in records}.values())


def pack(folder: Path) -> Path:
    """All records as lines of <folder>.jsonl, sorted."""
    records = sorted(read_records(folder), key=lambda record: record.job.file_name)
    path = folder.with_suffix(".jsonl")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    temporary.replace(path)
    return path


def neighbour(rate: float, up: bool) -> float:
    """The next of ..., 0.1, 0.2, 0.5, 1, 2, 5, ..."""
    power = math.floor(math.log10(rate) + 1e-9)
    digit = round(rate / 10**power)
    larger, smaller = {1: (2, 0.5), 2: (5, 1), 5: (10, 2)}[digit]
    return float(f"{(larger if up else smaller) * 10.0**power:.3g}")


def sweep(
    method: str, rates: Sequence[float], records: Iterable[Record], subjects: Sequence[str]
) -> tuple[list[Job], float | None]:
    """The tuning runs of `method` on `subjects` that are missing; and the best rate as soon as none are.

    The sweep begins with `rates` and goes on beyond the better end until the best rate is not at an end.
    """
    if not rates:
        return [], 0.0
    done = {(r.subject, r.rate): r.score() for r in records if r.method == method and r.seed == TUNING_SEED}
    tried = sorted({*rates, *(rate for _, rate in done)})
    while True:
        missing = [
            Job(method, subject, TUNING_SEED, rate)
            for rate in tried
            for subject in subjects
            if (subject, rate) not in done
        ]
        if missing:
            return missing, None
        best = max(tried, key=lambda rate: mean(done[subject, rate] for subject in subjects))
        if best not in (tried[0], tried[-1]) or len(tried) >= MOST_RATES:
            return [], best
        tried = sorted([*tried, neighbour(best, best == tried[-1])])
