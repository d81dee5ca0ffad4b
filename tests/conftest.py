"""Shared by all tests: no hub, one thread a process, and a small world of embedded data made once."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")

GOLDEN = Path(__file__).parent / "golden"
TINY_PRETRAINING = [
    "image.size=28", "encoder.hidden_size=32", "encoder.intermediate_size=48", "encoder.num_layers=1", "encoder.num_heads=2",
    "decoder.hidden_size=32", "decoder.intermediate_size=48", "decoder.num_layers=1", "decoder.num_heads=2", "optim.warmup_steps=2",
    "optim.batch_size=8", "optim.micro_batch_size=4", "data.validation_samples=8", "train.log_every=1", "train.validate_every=4",
    "train.save_every=3", "train.num_workers=0", "train.trackers=[]", "precision=fp32",
]
TINY_TUNING = [
    "llm.hidden_size=32", "llm.intermediate_size=48", "llm.num_layers=1", "llm.num_heads=2", "llm.vocab_size=360", "llm.max_positions=512",
    "optim.warmup_steps=1", "optim.batch_size=4", "optim.micro_batch_size=2", "train.log_every=1", "train.save_every=2",
    "train.num_workers=0", "train.trackers=[]", "precision=fp32",
]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run_two_processes(command: list[str], folder: Path, seconds: float = 300) -> tuple[list[int], list[str]]:
    """Exit codes and standard errors of `command` run by two processes of one gloo group that meets in `folder`."""
    from aimv2_vlm.train.launch import RENDEZVOUS

    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", RENDEZVOUS: str(folder / "meet"),
             "CUDA_VISIBLE_DEVICES": ""}
    logs, children = [folder / "0.txt", folder / "1.txt"], []
    try:
        for rank, log in enumerate(logs):
            with open(log, "w") as file:  # a process ends when its standard input does
                children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stderr=file, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        codes = [child.wait(timeout=seconds) for child in children]
    finally:
        for child in children:
            child.kill()
            child.stdin.close()
            child.wait()
    return codes, [log.read_text() for log in logs]


def run_cli(*words: object, check: bool = True) -> Done:
    """`aimv2-vlm` as a user would call it, in this process (importing torch anew for every call would take minutes)."""
    from aimv2_vlm.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    done = Done(status, out.getvalue(), err.getvalue())
    if check and status:
        raise AssertionError(f"exit status {status}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


def copy_golden(name: str, folder: Path, change=lambda state: None, config: bool = True) -> Path:
    """A golden checkpoint as users have it, in `folder`/`name`, after `change` to its tensors."""
    from safetensors.torch import load_file, save_file

    source = folder / name
    source.mkdir(parents=True)
    state = load_file(GOLDEN / name / "weights.safetensors")
    change(state)
    save_file(state, source / "model.safetensors")
    if config:
        shutil.copy(GOLDEN / name / "config.json", source)
    return source


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pictures of every kind: shards, held-out shards, conversations, benchmarks."""
    from aimv2_vlm.data import scenes

    root = tmp_path_factory.mktemp("scenes")
    scenes.write_pretraining_shards(root / "shards", "train", 96, samples_per_shard=32, workers=1)
    scenes.write_pretraining_shards(root / "held_out", "dev", 16, workers=1)
    scenes.write_conversations(root / "conversations", "train", 24, workers=1)
    scenes.write_benchmarks(root / "benchmarks", "dev", 4, workers=1)
    return root


@pytest.fixture(scope="session")
def tiny_encoder(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`final/` of a pre-training run of six steps."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    run_cli("pretrain", "demo_scenes", f"data_root={scenes_root}", f"out={out}", "optim.steps=6", *TINY_PRETRAINING)
    return out / "final"
