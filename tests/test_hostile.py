"""Hostile input is read for what it is: nothing in it is executed, nothing is written outside, nobody is called.

The corpus is made and read in a process of its own under an audit hook (benchmarks/reliability/hostile.py).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "reliability" / "hostile.py"


def watched(folder: Path, *words: str) -> dict:
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder), *words], capture_output=True, text=True, timeout=500, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    return watched(tmp_path_factory.mktemp("hostile") / "h")


def test_nothing_is_executed_or_written_outside(report):
    assert {name: seen for name, seen in report["seen"].items() if seen} == {}
    assert report["canary"] == [] and report["new"] == [] and report["links"] == [] and report["imported"] == []
    assert report["events"] > 1000  # the hook was there


# Status and last line: what is good is used, what is not is refused in one line.
SAID = {
    "data check": r"1: bad: ",
    "data check, pipe:": r"2: error: .*pipe:.*refused",
    "data check, ::": r"2: error: .*(only local paths|refused|chain)",
    "data check, a pickle": r"(1|2): ",
    "data pack, table": r"1: bad: ",
    "data pack, folder": r"1: bad: ",
    "conversations, lines": r"0: .*'missing_picture': ",
    "conversations, list": r"0: .*'missing_picture': ",
    "conversations, a pickle": r"2: .*neither a JSON list",
    "data check, conversations": r"1: (bad|missing): ",
    "pretrain": r"0: ",
    "pretrain, pipe:": r"2: error: .*pipe:.*refused",
    "pretrain, pickled tokenizer": r"2: error: .*not a sentencepiece model",
    "pretrain, pickled encoder": r"2: error: .*(pickle|safetensors)",
    "pretrain, a YAML tag": r"2: error: .*not valid YAML",
}


@pytest.mark.parametrize("name", SAID)
def test_each_command_ends_with_a_verdict(report, name):
    assert re.match(SAID[name], report["said"][name]), report["said"][name]
    assert set(report["said"]) == set(SAID)


def test_the_watch_sees_what_careless_readers_do(tmp_path):
    control = watched(tmp_path / "h", "--control")
    assert all(control["seen"].values()) and {"escaped.txt", "pyd", "npy", "shell", "written"} <= set(control["canary"])
