"""`aimv2-vlm demo`: the whole chain on embedded data, every stage of it a recipe that ships with the package."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aimv2_vlm.config import EvalConfig, PretrainRecipe, SftRecipe
from aimv2_vlm.recipe import load_recipe
from aimv2_vlm.train.metrics import Progress, format_seconds, say

PRETRAINING_SAMPLES, HELD_OUT_SAMPLES, DETAIL_SHARE = 24_000, 512, 0.67
TUNING_PICTURES, QUESTIONED, TEST_PICTURES = 4_000, 2, 200
ARMS = ("1x1", "2x2")  # one assistant per resolution, as in the paper's Figure 5


def demo(out: str, seed: int = 0, split: str = "test", overrides: Mapping[str, Sequence[str]] | None = None) -> int:
    """Make the data, pre-train, tune one assistant per tiling, evaluate, write `report.html`. Every stage goes on where it was
    stopped; finished stages are passed over.

    split: test, or dev for choosing settings. overrides: verb (pretrain | sft | eval) -> keys that differ from the recipes.
    Returns the evaluation's exit code.
    """
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    clock = Clock(root / "timings.json")
    data_root = root / "data"
    clock.stage("data", lambda: write_data(data_root, split))

    def keys(verb: str, stage: str, more: Sequence[str] = ()) -> list[str]:
        return [f"data_root={data_root}", f"seed={seed}", f"out={root / stage}", *more, *(overrides or {}).get(verb, ())]

    clock.stage("pre-training", lambda: train("pretrain", "demo_scenes", keys("pretrain", "pretrain")))
    encoder = [f"encoder.path={root / 'pretrain' / 'final'}"]
    for grid in ARMS:
        clock.stage(f"tuning {grid}", lambda grid=grid: train("sft", f"demo_scenes_{grid}", keys("sft", f"sft_{grid}", encoder)))
    from aimv2_vlm.evaluation.sweep import run_sweep
    from aimv2_vlm.train import launch

    evaluation: EvalConfig = load_recipe("eval", "demo_scenes", keys("eval", "eval", [f"processes={launch.cpu_processes()}", *model_overrides(root)]))

    code = clock.stage("evaluation", lambda: run_sweep(evaluation, progress=say))
    from aimv2_vlm.evaluation.report import write_report

    report = write_report(root / "report.html", runs={"pre-training": root / "pretrain", **{f"tuning {g}": root / f"sft_{g}" for g in ARMS}},
                          eval_dir=root / "eval", title="AIMv2 demo: shards to assistant", extra=clock.lines())
    clock.show()
    print(f"report: {report.resolve()}")
    return code


def train(verb: str, name: str, keys: Sequence[str]) -> None:
    """One stage: on a CPU as one process a core, two at most, which is nearly twice as fast as threads at these sizes."""
    from aimv2_vlm.train import launch
    from aimv2_vlm.train.run import pretrain, sft

    recipe: PretrainRecipe | SftRecipe = load_recipe(verb, name, keys)
    processes = launch.cpu_processes()
    if processes > 1 and not (Path(recipe.out) / "final").exists():
        launch.run_in_processes([verb, name, *keys], processes)
    else:
        (pretrain if verb == "pretrain" else sft)(recipe)


def model_overrides(root: Path) -> list[str]:
    """The recipe's model paths below this run's folder."""
    config: EvalConfig = load_recipe("eval", "demo_scenes", ["data_root=."])
    return [f"models.{i}.path={root / Path(model.path).relative_to('runs/demo')}" for i, model in enumerate(config.models)]


def _bar(what: str) -> Callable[[int, int], None]:
    return Progress(what, 1, unit="pictures").of


def write_shards(root: Path) -> None:
    """Shards to pre-train on and to validate with; what is already there is kept."""
    from aimv2_vlm.data import scenes

    scenes.write_pretraining_shards(root / "shards", "train", PRETRAINING_SAMPLES, detail_share=DETAIL_SHARE, progress=_bar("drawing shards"))
    scenes.write_pretraining_shards(root / "held_out", "dev", HELD_OUT_SAMPLES, progress=_bar("drawing held-out shards"))


def write_data(root: Path, split: str) -> None:
    """Shards, conversations and benchmarks of the embedded data; what is already there is kept."""
    from aimv2_vlm.data import scenes

    write_shards(root)
    asked = (scenes.HELD_OUT,)
    scenes.write_conversations(root / "conversations", "train", TUNING_PICTURES, held_out=asked, questioned=QUESTIONED,
                               progress=_bar("drawing conversations"))
    scenes.write_benchmarks(root / "benchmarks", split, TEST_PICTURES, held_out=asked, progress=_bar("drawing benchmarks"))


class Clock:
    """Seconds of each stage, added up over interrupted starts."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.seconds = {}

    def stage(self, name: str, work: Callable[[], object]) -> object:
        say(f"== {name}")
        start = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
            self.path.write_text(json.dumps(self.seconds, indent=1), encoding="utf-8")

    def lines(self) -> dict[str, str]:
        return {f"time for {name}": format_seconds(seconds) for name, seconds in self.seconds.items()}

    def show(self) -> None:
        total = sum(self.seconds.values())
        print("  ".join(f"{name} {format_seconds(s)}" for name, s in self.seconds.items()), f" total {format_seconds(total)}", file=sys.stderr)
