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
from conftest import TINY_PRETRAINING

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


def test_two_processes_train_the_same_model_as_one(scenes_root, tmp_path):
    from conftest import run_cli
    from safetensors.torch import load_file

    launch.run_in_processes(words(scenes_root, tmp_path / "two", 4), 2)
    run_cli(*words(scenes_root, tmp_path / "one", 4))
    two, one = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys()
    assert max(float((two[k] - one[k]).abs().max()) for k in one) < 1e-5
