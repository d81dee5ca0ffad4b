"""`aimv2-vlm doctor`: what is installed, what the machine has, what will and will not work here, with hints."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DISTRIBUTION = "aimv2-vlm"
GIB = 2**30

# Newest versions the tests ran with; a later minor release may have moved what this package leans on.
TESTED = {
    "torch": "2.15.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "lmms-eval": "0.7.3",
    "deepspeed": "0.19.8",
}

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    """One finding. `level` is ok, warn (something named in `hint` will not work) or fail (nothing will)."""

    name: str
    level: str
    found: str
    hint: str = ""


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, read from its metadata without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, list[Any]]:
    """This package's requirements by extra (`""`: always needed), from its metadata; empty if not installed."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
        extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    groups: dict[str, list[Requirement]] = {"": [], **{extra: [] for extra in extras}}
    for line in declared:
        requirement = Requirement(line)
        for extra in groups:
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if needed and (extra == "" or requirement.marker is not None):
                groups[extra].append(requirement)
    return groups


def _unmet(group: list[Any]) -> list[str]:
    """The requirements of `group` that are missing or outside their range, as `name>=1 (found 0.9)`."""
    missing = []
    for requirement in group:
        found = installed_version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier} ({f'found {found}' if found else 'missing'})")
    return missing


def _extra_hint(extra: str) -> str:
    return f"in the checkout: pip install --constraint constraints.txt --editable '.[{extra}]'"


def check_packages() -> list[Check]:
    groups = requirements()
    if not groups:
        return [
            Check(
                "packages",
                FAIL,
                f"{DISTRIBUTION} is not installed in this Python",
                "run `pip install -e .` in the checkout",
            )
        ]
    checks = []
    for requirement in sorted(groups[""], key=lambda r: r.name):
        found = installed_version(requirement.name)
        bad = _unmet([requirement])
        hint = f"pip install '{requirement.name}{requirement.specifier}'" if bad else ""
        checks.append(Check(requirement.name, FAIL if bad else OK, found or "missing", hint))
    for extra in sorted(set(groups) - {""}):
        bad = [line for line in _unmet(groups[extra]) if not line.startswith(DISTRIBUTION)]
        found = "installed" if not bad else "lacks " + ", ".join(bad)
        checks.append(Check(f"[{extra}]", WARN if bad else OK, found, _extra_hint(extra) if bad else ""))
    return checks + check_tested_versions()


def check_tested_versions() -> list[Check]:
    from packaging.version import Version

    checks = []
    for name, tested in TESTED.items():
        found = installed_version(name)
        if found and Version(found).release[:2] > Version(tested).release[:2]:
            hint = f"tested up to {tested}; if a test fails, install with --constraint constraints.txt"
            checks.append(Check(f"{name} (tested range)", WARN, found, hint))
    return checks


def check_python() -> Check:
    good = sys.version_info >= (3, 11)
    return Check("Python", OK if good else FAIL, platform.python_version(), "" if good else "3.11 or newer is needed")


def _memory_bytes() -> int:
    """Memory this process may use: the machine's, or its control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # absent, or the word `max`
            continue
    return total


def check_machine(folder: Path) -> list[Check]:
    from aimv2_vlm.train.directory import processor

    cores = len(os.sched_getaffinity(0))
    memory = _memory_bytes() / GIB
    disk = shutil.disk_usage(folder).free / GIB
    checks = [
        Check("CPU", OK, f"{processor()}, {cores} core{'s' if cores != 1 else ''} usable"),
        Check("memory", OK if memory >= 6 else WARN, f"{memory:.1f} GiB", "" if memory >= 6 else "the demo needs 6 GB"),
        Check(
            "disk",
            OK if disk >= 5 else WARN,
            f"{disk:.0f} GiB free in {folder}",
            "" if disk >= 5 else "the demo writes up to 5 GB (--out chooses another place)",
        ),
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / GIB
        small = size < 1
        hint = "data workers share batches there: give the container more (--shm-size=8g), or set train.num_workers=0"
        checks.append(Check("/dev/shm", WARN if small else OK, f"{size:.1f} GiB", hint if small else ""))
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    hint = "" if compiler else "train.compile=true and DeepSpeed build code at run time: install g++"
    checks.append(Check("C++ compiler", OK if compiler else WARN, compiler or "none", hint))
    return checks


def check_devices() -> tuple[list[Check], list[dict[str, Any]]]:
    """GPUs with memory, compute capability and bf16; and what `precision: auto` chooses. Imports torch."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [
            Check("torch import", FAIL, f"{type(error).__name__}: {error}", "reinstall torch with constraints.txt")
        ], []
    from aimv2_vlm.train.precision import explain_precision

    gpus = []
    checks = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpu = {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / GIB, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
                "bf16": properties.major >= 8,
            }
            gpus.append(gpu)
            found = f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}"
            hint = "" if gpu["bf16"] else "no bf16 arithmetic: runs use fp32 here"
            checks.append(Check(f"GPU {index}", OK if gpu["bf16"] else WARN, found, hint))
    elif Path("/proc/driver/nvidia/version").exists():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        hint = f"{built}: the driver is older, or CUDA_VISIBLE_DEVICES is empty"
        checks.append(Check("GPU", WARN, "an NVIDIA driver is loaded, but torch sees no device", hint))
    else:
        checks.append(Check("GPU", OK, "none; everything runs on the CPU"))
    precision, reason = explain_precision()
    checks.append(Check("precision: auto", OK, f"{precision} ({reason})"))
    backends = [
        name
        for name in ("gloo", "nccl")
        if torch.distributed.is_available() and torch.distributed.is_backend_available(name)
    ]
    checks.append(
        Check(
            "distributed",
            OK if backends else WARN,
            ", ".join(backends) or "none",
            "" if backends else "one process only",
        )
    )
    return checks, gpus


def check_pictures() -> list[Check]:
    """The JPEG decoder and the fonts that print of the embedded data is drawn with."""
    try:
        importlib.import_module("simplejpeg")
        checks = [Check("JPEG decoder", OK, f"simplejpeg {installed_version('simplejpeg')}")]
    except ImportError as error:
        checks = [Check("JPEG decoder", FAIL, str(error), "pip install simplejpeg")]
    spec = importlib.util.find_spec("matplotlib")
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" if spec and spec.origin else None
    fonts = sorted(folder.glob("DejaVu*.ttf")) if folder else []
    hint = (
        ""
        if fonts
        else "the embedded data are drawn with matplotlib's DejaVu fonts: pip install --force-reinstall matplotlib"
    )
    checks.append(Check("fonts", OK if fonts else FAIL, f"{len(fonts)} of matplotlib's DejaVu family", hint))
    return checks


def check_plugins() -> list[Check]:
    """Entry points of lmms-eval: one that cannot be found disables every model registered after it."""
    if installed_version("lmms-eval") is None:
        return []
    checks = []
    for entry in importlib.metadata.entry_points(group="lmms_eval.models"):
        try:
            found = importlib.util.find_spec(entry.module) is not None
        except ImportError:
            found = False
        hint = "" if found else "lmms-eval ignores plug-ins after a broken one: uninstall or mend it"
        checks.append(Check(f"lmms-eval plug-in {entry.name}", OK if found else WARN, entry.value, hint))
    return checks


def what_works(checks: list[Check], gpus: list[dict[str, Any]]) -> list[Check]:
    """What this machine can do, from the findings."""
    level = {check.name: check.level for check in checks}
    broken = [check.name for check in checks if check.level == FAIL]
    if broken:
        return [Check("everything", FAIL, f"needs {', '.join(broken)}", "mend the lines marked x above first")]
    minutes = 10 if gpus or any(c.name == "precision: auto" and c.found.startswith("bf16") for c in checks) else 15

    def extra(name: str, verb: str, found: str) -> Check:
        if level.get(f"[{name}]") == OK:
            return Check(verb, OK, found)
        return Check(verb, WARN, "not here", _extra_hint(name))

    works = [
        Check(
            "pretrain, sft, data, convert",
            OK,
            "on " + (f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}" if gpus else "the CPU"),
        ),
        extra("eval", "eval", "benchmarks through lmms-eval"),
        extra("eval", "demo", f"about {minutes} minutes on 2 cores"),
        extra("deepspeed", "train.strategy: zero2, zero3", "DeepSpeed"),
        extra("quantization", "8- and 4-bit decoders", "bitsandbytes"),
        extra("web", "chat --web", "gradio"),
    ]
    memory = sum(gpu["memory_gib"] for gpu in gpus)
    if memory >= 130:
        works.append(Check("tuning an 8B decoder", OK, f"{memory:.0f} GiB of GPU memory; exact AdamW needs about 130"))
    elif memory >= 80:
        works.append(
            Check("tuning an 8B decoder", OK, f"{memory:.0f} GiB of GPU memory: with 8-bit optimizer states (80 GiB)")
        )
    else:
        found = f"{memory:.0f} GiB of GPU memory" if gpus else "no GPU"
        works.append(
            Check(
                "tuning an 8B decoder",
                WARN,
                found,
                "needs 130 GiB in all, 80 with 8-bit optimizer states; use a small decoder",
            )
        )
    return works


def examine(folder: Path | None = None) -> dict[str, Any]:
    """Everything `doctor` says, as plain data: ok, python, checks, gpus, works."""
    folder = Path.cwd() if folder is None else folder
    devices, gpus = check_devices()
    checks = [check_python(), *check_machine(folder), *devices, *check_pictures(), *check_packages(), *check_plugins()]
    return {
        "ok": all(check.level != FAIL for check in checks),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "checks": [asdict(check) for check in checks],
        "gpus": gpus,
        "works": [asdict(check) for check in what_works(checks, gpus)],
    }


def doctor(as_json: bool = False) -> int:
    """Print what `examine` finds, as lines or as one JSON object. Returns the exit code: 1 when something fails."""
    found = examine()
    if as_json:
        print(json.dumps(found, indent=1))
        return 0 if found["ok"] else 1
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    marks = {OK: "[green]+[/]", WARN: "[yellow]![/]", FAIL: "[red]x[/]"}
    for title, rows in (("This machine", found["checks"]), ("What works here", found["works"])):
        console.print(f"\n[bold]{title}[/]")
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(marks[row["level"]], _plain(row["name"]), _plain(row["found"]))
            if row["hint"]:
                table.add_row("", "", f"[dim]-> {_plain(row['hint'])}[/]")
        console.print(table)
    console.print("\n[green]ready[/]" if found["ok"] else "\n[red]not ready[/]: mend the lines marked x")
    return 0 if found["ok"] else 1


def _plain(text: str) -> str:
    """Text without rich markup: `[eval]` is a name here."""
    from rich.markup import escape

    return escape(text)
