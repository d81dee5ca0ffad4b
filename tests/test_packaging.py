"""Set-up: what the wheel carries, what the Makefile refuses, what the doctor and `precision: auto` say."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from aimv2_vlm import doctor
from aimv2_vlm.config import UserError
from aimv2_vlm.train.precision import choose_precision, cpu_flags, explain_precision

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("pretrain", "sft_recipes", "eval_configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINNED = {
    name.strip().lower().replace("_", "-"): version.strip()
    for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names in a wheel built from a copy of the tree (old build folders would leak into it)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("aimv2_vlm", *RECIPES):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("aimv2_vlm-*.whl"))) as opened:
        return set(opened.namelist())


def test_wheel_carries_all_code_recipes_and_data_files(wheel):
    wanted = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "aimv2_vlm").rglob("*") if p.suffix in (".py", ".yaml", ".css")
    }
    assert wanted <= wheel
    for folder in RECIPES:
        found = [*(ROOT / folder).rglob("*.yaml"), *(ROOT / folder).glob("README.md")]
        assert found and {f"aimv2_vlm/recipes/{p.relative_to(ROOT).as_posix()}" for p in found} <= wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert not [name for name in wheel if "test" in name.lower() and not name.startswith("aimv2_vlm/evaluation/tasks/")]


def test_wheel_declares_the_command_and_the_plug_in():
    entries = importlib.metadata.entry_points()
    assert [e.value for e in entries.select(group="console_scripts", name="aimv2-vlm")] == ["aimv2_vlm.cli:command"]
    plug_in = entries.select(group="lmms_eval.models", name="aimv2_vlm")
    assert [e.value for e in plug_in] == ["aimv2_vlm.evaluation.lmms_manifest:manifest"]


def test_entry_points_lead_to_something():
    for group in ("console_scripts", "lmms_eval.models"):
        for entry in importlib.metadata.entry_points(group=group):
            if entry.value.startswith("aimv2_vlm."):
                assert callable(entry.load()) or entry.load() is not None


def test_constraints_are_exact_and_cover_every_requirement_of_the_tests_and_the_demo():
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in PINNED.values()), (
        "pins only, no local builds, paths or hosts"
    )
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *extras["eval"], *extras["deepspeed"], *extras["test"]]
    for requirement in map(Requirement, lines):
        name = requirement.name.lower().replace("_", "-")
        if name not in ("aimv2-vlm", "setuptools"):
            assert requirement.specifier.contains(PINNED[name]), requirement


def test_no_file_of_the_set_up_names_an_index_or_a_path():
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        content = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|file:|index-url|find-links|/home/|/root/|/tmp/|/work/", content), name


def test_doctor_knows_the_tested_versions():
    assert {name: PINNED[name] for name in doctor.TESTED} == doctor.TESTED


# ------------------------------------------------------------------------------------------------------------ Makefile


def make(folder: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess:
    shutil.copy(ROOT / "Makefile", folder)
    environment = {"PATH": path, "HOME": str(folder)}
    return subprocess.run(
        [shutil.which("make"), *arguments], cwd=folder, capture_output=True, text=True, env=environment
    )


def write_script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_make_names_the_python_it_needs(tmp_path):
    write_script(tmp_path / "old-python", "exit 1")
    done = make(tmp_path, ".venv/.created", f"PYTHON={tmp_path / 'old-python'}")
    assert done.returncode != 0 and "no Python 3.11 or newer found" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_falls_back_to_python3(tmp_path):
    """python3.11 is on the path but cannot run, python3 is new enough: it is used."""
    tools = tmp_path / "bin"
    write_script(tools / "python3.11", "exit 127")
    write_script(
        tools / "python3", f'case "$1" in -m) set -- -m venv --without-pip .venv;; esac; exec "{sys.executable}" "$@"'
    )
    for name in ("bash", "sh", "touch"):
        (tools / name).symlink_to(shutil.which(name))
    done = make(tmp_path, ".venv/.created", path=str(tools))
    assert done.returncode == 0, done.stderr
    assert "python3 -m venv" in done.stdout
    assert (tmp_path / ".venv/bin/python").exists() and (tmp_path / ".venv/.created").exists()


def test_second_start_installs_nothing(tmp_path):
    """With the stamps in place `make -n` only runs; a newer pyproject.toml installs again."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".venv").mkdir()
    for number, stamp in enumerate((".created", ".installed-eval", ".installed-test")):
        (tmp_path / ".venv" / stamp).touch()
        os.utime(tmp_path / ".venv" / stamp, (10 + number, 10 + number))
    for target, command in (("demo", "aimv2-vlm demo"), ("test", "-m pytest")):
        planned = make(tmp_path, "-n", target).stdout
        assert command in planned and "pip install" not in planned
        assert "pip install" in make(tmp_path, "-n", "-W", "pyproject.toml", target).stdout


@pytest.mark.parametrize(("pytest_exit", "passes"), [(0, True), (1, False), (2, False), (5, False)])
def test_ci_passes_on_what_pytest_says(tmp_path, pytest_exit, passes):
    """The real .ci/run and Makefile; exit 5 is pytest's for "no tests ran"."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    write_script(tmp_path / ".venv" / "bin" / "python", f'echo "$@" >> ran; exit {pytest_exit}')
    for stamp in (".created", ".installed-eval", ".installed-test"):
        (tmp_path / ".venv" / stamp).touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=tmp_path, capture_output=True, env=environment, stdin=subprocess.DEVNULL
    )
    assert (done.returncode == 0) is passes
    assert [line.split()[:2] for line in (tmp_path / "ran").read_text().splitlines()] == [["-m", "pytest"]]


# ------------------------------------------------------------------------------------------------ doctor and precision


def test_doctor_says_what_is_here_as_json_and_as_lines(capsys):
    code = doctor.doctor(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["ok"] else 1)
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["torch"]["found"] == importlib.metadata.version("torch")
    assert checks["Python"]["level"] == checks["JPEG decoder"]["level"] == checks["fonts"]["level"] == "ok"
    assert checks["[eval]"]["level"] == "ok"
    assert checks["precision: auto"]["found"].startswith(choose_precision())
    assert doctor.doctor() == code
    printed = capsys.readouterr().out
    assert "What works here" in printed and "[eval]" in printed


def test_doctor_fails_on_a_package_out_of_range(monkeypatch):
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: "5.16.9" if name == "transformers" else real(name))
    checks = {check.name: check for check in doctor.check_packages()}
    assert checks["transformers"].level == doctor.FAIL and ">=5.17" in checks["transformers"].hint
    assert checks["torch"].level == doctor.OK
    works = doctor.what_works(list(checks.values()), [])
    assert [w.level for w in works] == [doctor.FAIL] and "transformers" in works[0].found


def test_doctor_warns_of_what_was_never_tested(monkeypatch):
    newest = Version(doctor.TESTED["transformers"])
    found = {"transformers": f"{newest.major}.{newest.minor + 1}.0", "torch": doctor.TESTED["torch"]}
    monkeypatch.setattr(doctor, "installed_version", found.get)
    checks = doctor.check_tested_versions()
    assert [(c.name, c.level) for c in checks] == [("transformers (tested range)", doctor.WARN)]


@pytest.mark.parametrize(
    ("memory", "level", "word"),
    [(141.0, "ok", "exact AdamW"), (96.0, "ok", "8-bit"), (24.0, "warn", "GiB of GPU memory")],
)
def test_doctor_says_whether_an_8b_decoder_fits(memory, level, word):
    works = {w.name: w for w in doctor.what_works([], [{"memory_gib": memory}])}
    assert works["tuning an 8B decoder"].level == level and word in works["tuning an 8B decoder"].found


@pytest.mark.parametrize(
    ("line", "chosen"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", "fp32"),
        ("flags\t\t: fpu avx512f avx512_bf16", "bf16"),
        ("flags\t\t: fpu amx_tile amx_bf16 amx_int8", "bf16"),
        ("flags\t\t: fpu amx_tile amx_int8", "fp32"),
        ("Features\t: fp asimd", "fp32"),
        ("", "fp32"),
    ],
)
def test_precision_auto_asks_the_cpu(tmp_path, line, chosen):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: avx512_bf16 in a name is no flag\n{line}\n")
    precision, reason = explain_precision("cpu", cpu_flags(tmp_path / "cpuinfo"))
    assert precision == chosen and "the CPU has" in reason


def test_precision_takes_a_given_word_and_refuses_others(tmp_path):
    assert choose_precision("bf16", "cpu") == "bf16" and choose_precision("fp32", "cpu") == "fp32"
    assert choose_precision("auto", "cpu") == explain_precision("cpu")[0]
    assert cpu_flags(tmp_path / "absent") == frozenset()
    with pytest.raises(UserError, match="fp16"):
        choose_precision("fp16")
