"""Many subjects on workers that die: nothing is lost, and every adapter is that of its own run, to the bit."""

import dataclasses
import json
import os
import random
import signal
import threading
import time
from collections import deque
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from svfit_dreambooth import TrainConfig, read_adapter, train
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.fleet.fleet import MOST_LOSSES, Fleet, Means, Turn, cluster, room, run_fleet, steps_made
from svfit_dreambooth.training.subjects import subject_configs, subject_folders

NAME = "ray::Worker"


def make_subjects(folder, count):
    generator = np.random.default_rng(0)
    for number in range(count):
        own = folder / f"sks thing {number}"
        own.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(own / "a.png")
    return folder


def workers():
    """The workers that run now, of this process alone."""
    return [each for each in psutil.Process().children(recursive=True) if NAME in " ".join(each.cmdline() or [])]


class Killer(threading.Thread):
    """Kills a worker `times` times, at random moments while `folder` is being trained into."""

    def __init__(self, times, between, seed=0):
        super().__init__(daemon=True)
        self.times, self.between, self.random, self.killed, self.over = times, between, random.Random(seed), 0, False

    def run(self):
        while self.killed < self.times and not self.over:
            time.sleep(self.random.uniform(*self.between))
            try:
                victims = [each for each in workers() if each.status() != psutil.STATUS_ZOMBIE]
                if victims:
                    os.kill(self.random.choice(victims).pid, signal.SIGKILL)
                    self.killed += 1
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue


def assert_bit_equal(reports, configs, tmp_path):
    for report, config in zip(sorted(reports, key=lambda each: each.subject), configs, strict=True):
        alone = train(dataclasses.replace(config, output_dir=str(tmp_path / "alone" / report.subject)))
        ours, theirs = read_adapter(report.adapter), read_adapter(alone.adapter_path)
        assert ours.training == theirs.training
        assert all(torch.equal(ours.shifts[name], theirs.shifts[name]) for name in theirs.shifts)


def configs_of(folder, tiny_base, out, steps):
    common = TrainConfig(
        pretrained_model_name_or_path=str(tiny_base), output_dir=str(out), max_train_steps=steps, resolution=16,
        train_batch_size=1, validation_steps=0, final_pictures=False, fixed_loss_examples=1, checkpointing_steps=5,
        save_dtype="float32",
    )  # fmt: skip
    return subject_configs(subject_folders(folder), common)[0]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills as Unix does")
def test_two_kills(tiny_base, tmp_path, monkeypatch):
    """One before the first checkpoint of a subject, one after one: nothing is lost, and nothing is made twice."""
    monkeypatch.setattr("svfit_dreambooth.fleet.fleet.LOOK_SECONDS", 0.02)
    folder, out = make_subjects(tmp_path / "subjects", 2), tmp_path / "out"
    configs, at = configs_of(folder, tiny_base, out, 30), [1, 7]

    def kill(under_way):
        if at and any(
            steps_made(config) >= at[0] for config in under_way if config.adapter_name == f"sks-thing-{2 - len(at)}"
        ):
            (victim,) = workers()
            victim.kill()
            at.pop(0)

    reports = run_fleet(configs, Means(workers=1, cpus_per_worker=1, gpus_per_worker=0), on_look=kill)
    assert [(report.state, report.workers_lost) for report in reports] == [("finished", 1)] * 2, reports
    assert not at and not workers()
    assert_bit_equal(reports, configs, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills as Unix does")
def test_twenty_kills_at_random_moments(tiny_base, tmp_path):
    configs = configs_of(make_subjects(tmp_path / "subjects", 12), tiny_base, tmp_path / "out", 300)
    killer = Killer(20, (1, 8))
    killer.start()
    reports = run_fleet(configs, Means(workers=2, cpus_per_worker=1, gpus_per_worker=0))
    killer.over = True
    killer.join()
    assert [report.state for report in reports] == ["finished"] * 12, reports
    assert killer.killed == 20 and not workers()
    assert_bit_equal(reports, configs, tmp_path)


class Here:
    """What a fleet asks of Ray, with its workers in this process."""

    exceptions = SimpleNamespace(
        RayActorError=ConnectionError, WorkerCrashedError=EOFError, OutOfMemoryError=MemoryError, RayTaskError=KeyError
    )

    def __init__(self):
        self.hired = 0

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, **resources):
        return lambda kind: SimpleNamespace(remote=lambda: self.hire(kind()))

    def hire(self, worker):
        self.hired += 1
        return SimpleNamespace(train=SimpleNamespace(remote=lambda configs: partial(worker.train, configs)))

    def wait(self, answers, timeout):
        print("(raylet) what happens to workers")  # as Ray's own threads do
        return answers, []

    def get(self, answer):
        return answer()

    def kill(self, worker):
        pass


class Dying(Here):
    """Its workers run out of memory each time."""

    def get(self, answer):
        raise MemoryError


def test_the_command_repeats_nothing_and_passes_bad_folders(tiny_base, tmp_path, monkeypatch, capsys):
    here = Here()
    monkeypatch.setattr("svfit_dreambooth.fleet.fleet.cluster", lambda address: nullcontext(here))
    folder, out = make_subjects(tmp_path / "subjects", 1), tmp_path / "out"
    command = ["fleet", str(folder), "--output_dir", str(out), "--pretrained_model_name_or_path", str(tiny_base)]
    command += ["--max_train_steps", "2", "--resolution", "16", "--train_batch_size", "1", "--validation_steps", "0"]
    command += ["--no_final_pictures", "--fixed_loss_examples", "0"]
    assert main(command) == 0
    (first,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["state"], first["steps"], first["workers_lost"]) == ("finished", 2, 0)
    written = os.stat(first["adapter"]).st_mtime_ns
    make_subjects(folder, 3)  # the first has the same photo
    (folder / "empty").mkdir()
    assert main([*command, "--subjects_at_once", "2"]) == 2 and here.hired == 2
    told = capsys.readouterr()
    lines = {line["subject"]: line for line in map(json.loads, told.out.splitlines())}
    states = {name: line["state"] for name, line in lines.items()}
    assert states == {
        "empty": "failed", "sks-thing-0": "finished before", "sks-thing-1": "finished", "sks-thing-2": "finished"
    }  # fmt: skip
    assert "empty" in lines["empty"]["message"] and "1 of 4 subjects failed" in told.err
    assert "1 finished before, 2 finished, 1 failed" in told.err
    assert os.stat(first["adapter"]).st_mtime_ns == written


def test_a_subject_that_workers_always_die_of_is_given_up_in_plain_words(tmp_path):
    dying, reports = Dying(), []
    turn = Turn([TrainConfig(output_dir=str(tmp_path), adapter_name="dog")])
    fleet = Fleet(dying, Means(), deque([turn]), reports.append)
    while fleet.step():
        pass
    fleet.dismiss()
    (report,) = reports
    assert dying.hired == report.workers_lost == MOST_LOSSES and report.state == "failed"
    assert "5 workers in a row ran out of memory at it without getting beyond step 0" in report.message


def test_room_for_workers():
    assert room({"CPU": 8.0}, Means(), 20) == (1, {"num_cpus": 8, "num_gpus": 0.0})
    assert room({"CPU": 8.0}, Means(workers=3), 20) == (3, {"num_cpus": 2, "num_gpus": 0.0})
    assert room({"CPU": 8.0}, Means(workers=3), 1) == (1, {"num_cpus": 8, "num_gpus": 0.0})
    assert room({"CPU": 16.0, "GPU": 4.0}, Means(), 20) == (4, {"num_cpus": 4, "num_gpus": 1.0})
    assert room({"CPU": 16.0, "GPU": 1.0}, Means(gpus_per_worker=0.5), 20) == (2, {"num_cpus": 8, "num_gpus": 0.5})
    for means, message in [
        (Means(gpus_per_worker=1), "gpus_per_worker is 1, and there are 0 GPUs"),
        (Means(cpus_per_worker=9), "cpus_per_worker is 9, and there are 8"),
        (Means(workers=9), "workers is 9, and there is room for 8"),
    ]:
        with pytest.raises(SVFitError, match=message):
            room({"CPU": 8.0}, means, 20)


def test_a_cluster_that_is_not_there():
    with pytest.raises(SVFitError, match=r"no Ray cluster answers at address 127\.0\.0\.1:1 "), cluster("127.0.0.1:1"):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--workers", "0"], "error: --workers is '0': give a whole number of 1 or more."),
        (["a", "--gpus_per_worker", "x"], "error: --gpus_per_worker is 'x': give a number above 0."),
        (["a", "--instance_data_dir", "b"], "leave --instance_data_dir out"),
        (["/no/such"], "error: --subjects /no/such cannot be read"),
        ([], "the following arguments are required: subjects"),
    ],
)
def test_the_command_refuses(arguments, message, capsys):
    assert main(["fleet", *arguments]) == 2
    assert message in capsys.readouterr().err
