"""Many subjects on workers that die: nothing is lost, and every adapter is that of its own run, to the bit."""

import dataclasses
import json
import os
import random
import signal
import threading
import time
from collections import deque

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
def test_two_kills(tiny_base, tmp_path, monkeypatch, capsys):
    """One before the first checkpoint of a subject, one after one: nothing is lost, and nothing is made twice."""
    monkeypatch.setattr("svfit_dreambooth.fleet.fleet.LOOK_SECONDS", 0.02)
    folder, out = make_subjects(tmp_path / "subjects", 2), tmp_path / "out"
    configs, at = configs_of(folder, tiny_base, out, 60), [1, 12]

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
    # the same command again repeats nothing, and trains what is new, beside a folder that holds no photo
    (folder / "empty").mkdir()
    written = {report.adapter: os.stat(report.adapter).st_mtime_ns for report in reports}
    make_subjects(folder, 3)
    command = ["fleet", str(folder), "--output_dir", str(out), "--subjects_at_once", "4", "--gpus_per_worker", "0"]
    command += ["--pretrained_model_name_or_path", str(tiny_base), "--max_train_steps", "60", "--resolution", "16"]
    command += [
        "--train_batch_size",
        "1",
        "--validation_steps",
        "0",
        "--no_final_pictures",
        "--fixed_loss_examples",
        "1",
    ]
    assert main([*command, "--checkpointing_steps", "5", "--save_dtype", "float32"]) == 2
    told = capsys.readouterr()
    lines = {line["subject"]: line for line in map(json.loads, told.out.splitlines())}
    assert {name: line["state"] for name, line in lines.items()} == {
        "empty": "failed", "sks-thing-0": "finished before", "sks-thing-1": "finished before", "sks-thing-2": "finished"
    }  # fmt: skip
    assert "empty" in lines["empty"]["message"] and "1 of 4 subjects failed" in told.err
    assert "1 finished, 1 failed" in told.err and {path: os.stat(path).st_mtime_ns for path in written} == written


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills as Unix does")
def test_twenty_kills_at_random_moments(tiny_base, tmp_path):
    configs = configs_of(make_subjects(tmp_path / "subjects", 12), tiny_base, tmp_path / "out", 300)
    killer = Killer(20, (0.5, 6))
    killer.start()
    reports = run_fleet(configs, Means(workers=2, cpus_per_worker=1, gpus_per_worker=0))
    killer.over = True
    killer.join()
    assert [report.state for report in reports] == ["finished"] * 12, reports
    assert killer.killed == 20 and not workers()
    assert_bit_equal(reports, configs, tmp_path)


class Dying:
    """What a fleet asks of Ray, whose workers run out of memory each time."""

    class exceptions:
        RayActorError = WorkerCrashedError = RayTaskError = ConnectionError
        OutOfMemoryError = MemoryError

    def __init__(self):
        self.train, self.hired = self, 0

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, *work, **resources):
        if resources:  # as a decorator of the worker
            return lambda kind: self
        self.hired += not work
        return self

    def wait(self, answers, timeout):
        return answers, []

    def get(self, answer):
        raise MemoryError

    def kill(self, worker):
        raise AssertionError("nobody is left")


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
