"""Many subjects on workers that die: nothing is lost, and every adapter is that of its own run, to the bit."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import nullcontext, suppress
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from svfit_dreambooth import TrainConfig, read_adapter, train
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.fleet.cluster import Means, cluster, room
from svfit_dreambooth.fleet.fleet import MOST_LOSSES, MOST_SETBACKS, Fleet, Turn, run_fleet, steps_made
from svfit_dreambooth.fleet.worker import Report
from svfit_dreambooth.subjects.configs import subject_configs, subject_folders
from svfit_dreambooth.training.checkpoints import list_checkpoints
from svfit_dreambooth.training.events import Phase, Stepped
from svfit_dreambooth.training.journal import RunFolder

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
    """Kills a worker `times` times: at random points of the work, and a random moment after each once more.

    Points are counted in steps, so that the work never ends before the last of them, however busy the machine is; the
    second comes within the time that a worker needs to start, so that some die before they have done anything.
    """

    def __init__(self, times, configs, seed=0):
        super().__init__(daemon=True)
        self.configs, self.random, self.killed, self.over = configs, random.Random(seed), 0, False
        self.points = sorted(
            self.random.sample(range(1, sum(each.max_train_steps for each in configs) // 2), times // 2)
        )

    def run(self):
        began = time.monotonic()
        self.wait_for(1)
        start = time.monotonic() - began
        for point in self.points:
            self.wait_for(point)
            self.kill()
            time.sleep(self.random.uniform(0, start))
            self.kill()

    def wait_for(self, point):
        """Until so many steps have been made by all subjects."""
        while not self.over and sum(map(steps_made, self.configs)) < point:
            time.sleep(0.02)

    def kill(self):
        """One of the workers, once there is one."""
        while not self.over:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                victims = [each for each in workers() if each.status() != psutil.STATUS_ZOMBIE]
                if victims:
                    os.kill(self.random.choice(victims).pid, signal.SIGKILL)
                    self.killed += 1
                    return
            time.sleep(0.02)


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


def checkpoint_steps(config):
    return [int(path.stem[5:]) for path in list_checkpoints(RunFolder(config.output_dir, None).checkpoints)]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills as Unix does")
def test_two_kills_and_a_stop(tiny_base, tmp_path, monkeypatch):
    """Killed before the first checkpoint of a subject and after one, and told to stop: nothing is lost or made twice."""
    monkeypatch.setattr("svfit_dreambooth.fleet.fleet.LOOK_SECONDS", 0.02)
    folder, out = make_subjects(tmp_path / "subjects", 2), tmp_path / "out"
    first, second = configs = configs_of(folder, tiny_base, out, 100)

    def at(config, step, act):
        """An `on_look` that acts once, when the run of `config` has come to `step`."""
        left = [act]

        def look(under_way):
            names = [each.adapter_name for each in under_way]
            if left and config.adapter_name in names and steps_made(config) >= step:
                left.pop()()

        return look

    def both(*looks):
        return lambda under_way: [look(under_way) for look in looks]

    def kill():
        (victim,) = workers()
        victim.kill()

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    means = Means(workers=1, cpus_per_worker=1, gpus_per_worker=0)
    with cluster(None) as ray:
        monkeypatch.setattr("svfit_dreambooth.fleet.fleet.cluster", lambda *_: nullcontext(ray))
        reports = run_fleet(configs, means, on_look=both(at(first, 1, kill), at(first, 12, stop)))
        told = {report.subject: (report.state, report.workers_lost, report.message) for report in reports}
        assert told == {
            first.adapter_name: ("stopped", 1, None), second.adapter_name: ("stopped", 0, "not begun.")
        }  # fmt: skip
        assert checkpoint_steps(first)[-1] == steps_made(first) >= 12  # the step at which it was told
        reports = run_fleet(configs, means, on_look=at(second, 7, kill))
        assert [(report.state, report.workers_lost) for report in reports] == [("finished", 0), ("finished", 1)], (
            reports
        )
    assert not workers()
    assert_bit_equal(reports, configs, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills as Unix does")
def test_twenty_kills_at_random_moments(tiny_base, tmp_path):
    configs = configs_of(make_subjects(tmp_path / "subjects", 12), tiny_base, tmp_path / "out", 300)
    killer = Killer(20, configs)
    killer.start()
    reports = run_fleet(configs, Means(workers=2, cpus_per_worker=1, gpus_per_worker=0))
    killer.over = True
    killer.join()
    assert [report.state for report in reports] == ["finished"] * 12, reports
    assert killer.killed == 20 and not workers()
    assert_bit_equal(reports, configs, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Ray watches memory on Linux")
def test_workers_that_ray_ends_as_memory_runs_low(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")  # of the machine's
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    configs = configs_of(make_subjects(tmp_path / "subjects", 1), tiny_base, tmp_path / "out", 5)
    reports = []
    with pytest.raises(SVFitError, match="no worker has opened the base, 5 in a row ran out of memory: give each more"):
        run_fleet(configs, Means(workers=1, cpus_per_worker=1, gpus_per_worker=0), reports.append)
    assert [report.state for report in reports] == ["stopped"] and not workers()


SRUN = """#!/bin/bash
while [ "$1" != ray ]; do case "$1" in -w) shift 2;; *) shift;; esac; done
exec {ray} "${{@:2}}"
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="as Slurm is")
def test_the_slurm_recipe(tiny_base, tmp_path):
    """Its own lines, with two machines that are this one: all workers come, and save when the time is nearly over."""
    page = (Path(__file__).parents[1] / "docs" / "many-subjects.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```sh\n(#!/bin/bash.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    folder, out = make_subjects(tmp_path / "subjects", 2), tmp_path / "out"
    more = f"--pretrained_model_name_or_path {tiny_base} --max_train_steps 100000 --resolution 16 --train_batch_size 1 "
    more += "--validation_steps 0 --no_final_pictures --checkpointing_steps 100000 --fixed_loss_examples 0 "
    for ours, theirs in {
        "/shared/subjects": str(folder), "/shared/runs": str(out), "python -m": f"{sys.executable} -m",
        "--workers 16": f"--workers 2 --cpus_per_worker 1 --gpus_per_worker 0 {more}", "--nodes=3": "--nodes=1",
    }.items():  # fmt: skip
        assert ours in recipe
        recipe = recipe.replace(ours, theirs)
    (tmp_path / "bin").mkdir()
    commands = {"scontrol": "#!/bin/bash\necho 127.0.0.1\necho other\n"}
    commands["srun"] = SRUN.format(ray=Path(sys.executable).with_name("ray"))
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": str(os.getpid()),
    }  # fmt: skip
    configs = [TrainConfig(output_dir=str(out / f"sks-thing-{i}"), adapter_name=f"sks-thing-{i}") for i in range(2)]
    with open(tmp_path / "lines", "w") as lines, open(tmp_path / "said", "w") as said:
        job = subprocess.Popen(["bash", "-c", recipe], stdout=lines, stderr=said, env=environment)
    inside = []
    try:
        while job.poll() is None and not all(steps_made(config) > 3 for config in configs):
            time.sleep(0.2)
        inside = psutil.Process(job.pid).children(recursive=True)
        os.kill(job.pid, signal.SIGTERM)  # as --signal=B:TERM does, to the batch shell alone
        job.wait(timeout=120)
    finally:  # as Slurm does then
        for process in inside:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    lines, said = ((tmp_path / name).read_text() for name in ("lines", "said"))
    told = {line["subject"]: line for line in map(json.loads, lines.splitlines())}
    assert job.returncode == 0 and {line["state"] for line in told.values()} == {"stopped"}, said
    for config in configs:
        assert checkpoint_steps(config) == [steps_made(config)] == [told[config.adapter_name]["steps"]]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals as Unix does")
def test_ctrl_c_at_the_command(tiny_base, tmp_path):
    """The terminal sends it to all processes of the command; every one of two workers saves what it has learnt."""
    folder, out = make_subjects(tmp_path / "subjects", 3), tmp_path / "out"
    command = [sys.executable, "-m", "svfit_dreambooth", "fleet", str(folder), "--output_dir", str(out)]
    command += ["--pretrained_model_name_or_path", str(tiny_base), "--max_train_steps", "100000", "--resolution", "16"]
    command += ["--train_batch_size", "1", "--validation_steps", "0", "--no_final_pictures", "--workers", "2"]
    command += ["--checkpointing_steps", "100000", "--fixed_loss_examples", "0", "--learning_rate", "0.01"]
    configs = [TrainConfig(output_dir=str(out / f"sks-thing-{i}"), adapter_name=f"sks-thing-{i}") for i in range(3)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not all(steps_made(config) > 3 for config in configs[:2]):
        time.sleep(0.2)
    inside = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    lines, said = process.communicate(timeout=120)
    told = {line["subject"]: line for line in map(json.loads, lines.splitlines())}
    assert process.returncode == 0 and {line["state"] for line in told.values()} == {"stopped"}, said
    assert told["sks-thing-2"]["message"] == "not begun." and "to go on: the same command" in said
    for config in configs[:2]:
        assert checkpoint_steps(config) == [steps_made(config)] == [told[config.adapter_name]["steps"]]
        assert read_adapter(told[config.adapter_name]["adapter"]).training["steps"] == steps_made(config)
    assert not psutil.wait_procs(inside, timeout=10)[1]


class Hired(SimpleNamespace):
    """What Ray calls a worker."""

    __hash__ = object.__hash__


class Here:
    """What a fleet asks of Ray, with its workers in this process."""

    exceptions = SimpleNamespace(
        RayTaskError=KeyError, OutOfMemoryError=MemoryError, RayError=(ConnectionError, MemoryError)
    )  # fmt: skip

    def __init__(self):
        self.hired = 0

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {}}]

    def remote(self, **resources):
        return lambda kind: SimpleNamespace(remote=lambda: self.hire(kind()))

    def hire(self, worker):
        self.hired += 1
        return Hired(
            **{name: SimpleNamespace(remote=partial(partial, getattr(worker, name))) for name in ("open", "train")}
        )

    def wait(self, answers, timeout):
        print("(raylet) what happens to workers")  # as Ray's own threads do
        return answers, []

    def get(self, answer):
        return answer()

    def kill(self, worker):
        pass


class Script(Here):
    """Its workers do as they are told, one function after the other."""

    def __init__(self, openings, trainings):
        super().__init__()
        self.openings, self.trainings = iter(openings), iter(trainings)

    def hire(self, worker):
        self.hired += 1
        return Hired(
            open=SimpleNamespace(remote=lambda config: next(self.openings)),
            train=SimpleNamespace(remote=lambda configs: partial(next(self.trainings), configs)),
        )


def opened():
    return "here", 1


def out_of_memory(*_):
    raise MemoryError


def finished(configs):
    return [Report(config.adapter_name, "finished", config.output_dir) for config in configs]


def dies_at(step, doing=None):
    def train(configs):
        folder = RunFolder(configs[0].output_dir, configs[0].adapter_name)
        folder.note(Stepped(step))
        if doing is not None:
            folder.note(Phase(doing, time.time(), step))
        raise ConnectionError("The worker died unexpectedly.")

    return train


def reports_of(script, folder):
    turn, reports = Turn([TrainConfig(output_dir=str(folder), adapter_name="dog")]), []
    fleet = Fleet(script, Means(), deque([turn]), reports.append)
    while fleet.step():
        pass
    fleet.dismiss()
    return reports


def test_the_command_repeats_nothing_and_passes_bad_folders(tiny_base, tmp_path, monkeypatch, capsys):
    here = Here()
    monkeypatch.setattr("svfit_dreambooth.fleet.fleet.cluster", lambda *_: nullcontext(here))
    monkeypatch.setattr("svfit_dreambooth.fleet.worker.whereabouts", opened)
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


@pytest.mark.parametrize(
    ("death", "message"),
    [
        (out_of_memory, "5 workers in a row ran out of memory at it after step 0: give workers more memory"),
        (dies_at(50, "looking"), "5 workers in a row were killed or crashed at it after step 50: give"),
    ],
)
def test_a_subject_that_workers_always_die_of_is_given_up_in_plain_words(death, message, tmp_path):
    script = Script(repeat(opened), repeat(death))
    (report,) = reports_of(script, tmp_path)
    assert script.hired == report.workers_lost == MOST_LOSSES and report.state == "failed"
    assert report.message.startswith(message)


def test_a_subject_whose_workers_die_anywhere_is_not_given_up(tmp_path):
    """Also where they get no further for long, as checkpoints are rare."""
    places = [90, 3, 60, 60, 60, 60, 20, 88, 7, 7, 1]
    (report,) = reports_of(Script(repeat(opened), [*map(dies_at, places), finished]), tmp_path)
    assert (report.state, report.workers_lost) == ("finished", len(places))


def test_a_subject_that_gets_no_further_is_given_up_in_the_end(tmp_path):
    script = Script(repeat(opened), map(dies_at, [90, *map(int, "123456789" * 9)]))
    (report,) = reports_of(script, tmp_path)
    assert report.workers_lost == MOST_SETBACKS and "without getting beyond step 90: find out" in report.message


def test_workers_that_die_while_they_open_the_base_say_nothing_about_a_subject(tmp_path):
    openings = [*[out_of_memory] * (MOST_LOSSES - 1), opened] * 2
    (report,) = reports_of(Script(openings, [dies_at(1), finished]), tmp_path)
    assert (report.state, report.workers_lost) == ("finished", 1)
    with pytest.raises(SVFitError, match="no worker has opened the base, 5 in a row ran out of memory"):
        reports_of(Script(repeat(out_of_memory), []), tmp_path)


def test_a_base_that_cannot_be_opened_ends_a_fleet_in_its_own_sentence(tmp_path):
    class Remote(KeyError):
        cause = SVFitError("there is no base here.")

    def open_none():
        raise Remote

    with pytest.raises(SVFitError, match=r"^there is no base here\.$"):
        reports_of(Script([open_none], []), tmp_path)


def test_subjects_of_a_worker_that_was_told_to_end_go_on(tmp_path):
    def stopped(configs):
        return [Report(config.adapter_name, "stopped", config.output_dir) for config in configs]

    (report,) = reports_of(Script(repeat(opened), [stopped, finished]), tmp_path)
    assert (report.state, report.workers_lost) == ("finished", 1)


def test_room_for_workers():
    assert room([{"CPU": 8.0}], Means(), 20) == (1, {"num_cpus": 8, "num_gpus": 0.0})
    assert room([{"CPU": 8.0}], Means(workers=3), 20) == (3, {"num_cpus": 2, "num_gpus": 0.0})
    assert room([{"CPU": 8.0}], Means(workers=3), 1) == (1, {"num_cpus": 8, "num_gpus": 0.0})
    assert room([{"CPU": 16.0, "GPU": 4.0}], Means(), 20) == (4, {"num_cpus": 4, "num_gpus": 1.0})
    assert room([{"CPU": 16.0, "GPU": 1.0}], Means(gpus_per_worker=0.5), 20) == (2, {"num_cpus": 8, "num_gpus": 0.5})
    for means, message in [
        (Means(gpus_per_worker=1), "gpus_per_worker is 1, and there are 0 GPUs"),
        (Means(cpus_per_worker=9), "cpus_per_worker is 9, and there are 8"),
        (Means(workers=9), "workers is 9, and there is room for 8"),
    ]:
        with pytest.raises(SVFitError, match=message):
            room([{"CPU": 8.0}], means, 20)


def test_a_worker_is_on_one_machine():
    """One that is given more CPUs than any machine has would be waited for in vain."""
    assert room([{"CPU": 8.0}, {"CPU": 4.0}], Means(), 20) == (1, {"num_cpus": 8, "num_gpus": 0.0})
    assert room([{"CPU": 8.0}, {"CPU": 4.0}], Means(workers=2), 20) == (2, {"num_cpus": 4, "num_gpus": 0.0})
    assert room([{"CPU": 3.0}] * 3, Means(workers=4), 20) == (4, {"num_cpus": 1, "num_gpus": 0.0})
    assert room([{"CPU": 32.0, "GPU": 4.0}] * 4, Means(workers=16), 20) == (16, {"num_cpus": 8, "num_gpus": 1.0})
    assert room([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 64.0}], Means(), 20) == (1, {"num_cpus": 8, "num_gpus": 1.0})
    for means, message in [
        (Means(gpus_per_worker=2), "gpus_per_worker is 2, and there are 1 GPUs on a machine"),
        (Means(cpus_per_worker=6), "cpus_per_worker is 6, and there are 4 on a machine"),
        (Means(gpus_per_worker=0, cpus_per_worker=3, workers=4), "workers is 4, and there is room for 2"),
    ]:
        with pytest.raises(SVFitError, match=message):
            room([{"CPU": 4.0, "GPU": 1.0}] * 2, means, 20)


def test_machines_of_a_cluster_may_join_while_a_fleet_waits(tmp_path, monkeypatch):
    monkeypatch.setattr("svfit_dreambooth.fleet.cluster.time.sleep", lambda seconds: None)
    script = Script(repeat(opened), repeat(finished))
    machine = {"Alive": True, "Resources": {"CPU": 1.0}}
    there = iter([[machine], [machine], [machine, machine]])
    script.nodes = lambda: next(there)
    turns = deque(Turn([TrainConfig(output_dir=str(tmp_path / name), adapter_name=name)]) for name in ("dog", "mug"))
    assert Fleet(script, Means(workers=2, startup_seconds=60), turns, print).count == 2
    there = iter([[machine]])
    with pytest.raises(SVFitError, match="workers is 2, and there is room for 1"):
        Fleet(script, Means(workers=2), turns, print)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:99999", "no such host:1"]
)
def test_a_cluster_that_is_not_there(address):
    with (
        pytest.raises(SVFitError, match=rf"^no Ray cluster answers at address {re.escape(address)} "),
        cluster(address),
    ):
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
