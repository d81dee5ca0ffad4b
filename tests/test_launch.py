"""Several processes of one command: they train as one, stop as one, and none outlives its launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_PRETRAINING, run_two_processes

from aimv2_vlm.train import launch
from aimv2_vlm.train.loop import EXIT_STOPPED, Stopped


def words(scenes_root: Path, out: Path, steps: int) -> list[str]:
    return ["pretrain", "demo_scenes", f"data_root={scenes_root}", f"out={out}", *TINY_PRETRAINING, f"optim.steps={steps}", "train.save_every=1000"]


def last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def until(condition, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def alive(text: str) -> list[int]:
    """Processes whose command line holds `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text in (entry / "cmdline").read_text(errors="replace") and "Z" not in (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


LAUNCHER = """
import sys
from aimv2_vlm.train.launch import run_in_processes
from aimv2_vlm.train.loop import Stopped
try:
    run_in_processes(sys.argv[1:], 2)
except Stopped as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.exit_code)
"""


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_signal_saves_and_stops_all_and_the_same_command_goes_on(scenes_root, tmp_path):
    out = tmp_path / "stopped"
    launcher = start(words(scenes_root, out, 100_000))
    until(lambda: last_step(out) >= 2)
    launcher.send_signal(signal.SIGINT)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == EXIT_STOPPED and said.count("the same command goes on from there") == 1
    assert not alive(str(out))
    reached = last_step(out)
    assert (out / "checkpoints").exists() and reached >= 2

    # The same run, left hard: no process may go on without its launcher.
    launcher = start(words(scenes_root, out, 100_000))
    until(lambda: last_step(out) > reached)
    launcher.kill()
    launcher.communicate()
    until(lambda: not alive(str(out)), 20)


def test_an_error_ends_every_process_with_its_status(tmp_path):
    with pytest.raises(Stopped) as stop:
        launch.run_in_processes(["pretrain", "demo_scenes", f"data_root={tmp_path / 'nowhere'}", f"out={tmp_path / 'run'}"], 2)
    assert stop.value.exit_code == 2


def test_a_process_that_dies_ends_the_others_and_is_named(scenes_root, tmp_path):
    out = tmp_path / "run"
    launcher = start(words(scenes_root, out, 100_000))
    until(lambda: last_step(out) >= 2)
    victim = max(pid for pid in alive(str(out)) if pid != launcher.pid)
    os.kill(victim, signal.SIGKILL)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL and "was ended by SIGKILL" in said and "another process of this run has ended" in said
    assert "Traceback" not in said and not alive(str(out))


ROUNDS = """
import os
import sys
import torch
import torch.distributed as dist
from aimv2_vlm import cli

def main():
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for work in [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(50)][:waited]:
        work.wait()
    print("through", end="")
    if how == "raise":
        raise ValueError("unforeseen")
    return int(how)

cli.main, how, waited = main, sys.argv[2], int(sys.argv[3])
for attempt in range(4):
    rendezvous, children = f"{sys.argv[1]}/{attempt}", []
    for rank in range(2):
        if not (child := os.fork()):
            cli.command()
        children.append(child)
    for child in children:
        print("", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("how, code", [("0", 0), ("2", 2), ("raise", 1)])
def test_a_process_of_a_group_ends_with_its_own_status(how, code, tmp_path):
    """Whatever gloo's threads still hold: beside them, interpreters that finalise abort in most of these rounds."""
    program = [sys.executable, "-c", ROUNDS, str(tmp_path), how, "30"]  # the last 20 are not waited for: threads slower than the process
    ended = subprocess.run(program, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=120)
    assert [line.split()[-1] for line in ended.stdout.splitlines()] == [str(code)] * 8, ended.stderr
    assert ended.stdout.count("through") == 8  # buffered lines are not lost
    assert "terminate called" not in ended.stderr and ended.stderr.count("ValueError: unforeseen") == (8 if how == "raise" else 0)


def test_two_processes_train_the_same_model_as_one_started_by_the_command_or_by_accelerate(scenes_root, tmp_path):
    from conftest import run_cli
    from safetensors.torch import load_file

    launch.run_in_processes(words(scenes_root, tmp_path / "two", 4), 2)
    flags = ["--cpu", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    started = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "aimv2_vlm", *words(scenes_root, tmp_path / "accelerate", 4)]
    done = subprocess.run(started, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run_cli(*words(scenes_root, tmp_path / "one", 4))
    two, accelerated, one = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("two", "accelerate", "one"))
    assert two.keys() == accelerated.keys() == one.keys()
    assert max(float((two[k] - one[k]).abs().max()) for k in one) < 1e-5
    assert all(two[k].equal(accelerated[k]) for k in two)


PATIENT = """
import datetime, sys, time
import torch.distributed as dist
from aimv2_vlm.train import distributed
distributed.WAITING_NOTE_S = 1.0
placement = distributed.Placement("ddp", "fp32")
dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2), dist.group.WORLD)
order = []
placement.main_first(lambda: (order.append(time.time()), placement.is_main and time.sleep(4)), "write a large model")
starts = [float(start) for start in placement.gather_strings([str(order[0])])]
assert starts[1] - starts[0] >= 4, starts
print("waited", file=sys.stderr)
if placement.is_main:
    time.sleep(4)
placement.barrier()  # what waiting in a collective call comes to
"""


def test_others_wait_for_the_first_process_longer_than_a_collective_call_may_take(tmp_path):
    codes, said = run_two_processes([sys.executable, "-c", PATIENT], tmp_path, 120)
    assert "waiting for the first process to write a large model" in said[1] and "waiting for" not in said[0], said
    assert all("\nwaited" in f"\n{text}" for text in said), said
    assert codes[1] and "imed out" in said[1].split("waited")[-1], said[1]
