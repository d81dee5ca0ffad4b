"""A grid of probes trained at once: each point equals its separate run; known data sets in the layouts people have; the eval verb."""

from __future__ import annotations

import copy
import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_cli
from PIL import Image
from safetensors.torch import load_file, save_file
from test_probe import COLORS, SIZE, WIDTH, a_recipe, colors, encoder_path, picture, write_folder  # noqa: F401  (fixtures)

from aimv2_vlm.config import LabelledData, Optimizer, UserError
from aimv2_vlm.data import recognition
from aimv2_vlm.data.labelled import open_splits, read_split
from aimv2_vlm.evaluation import probing
from aimv2_vlm.models.probe import AttentiveHead, AttentiveHeads
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.grid import GridAdamW, grid_points
from aimv2_vlm.train.loop import Stopped
from aimv2_vlm.train.optim import build_optimizer, learning_rate, parameter_groups

GRID = [[1e-4, 0.05], [2e-3, 0.05], [2e-3, 0.1], [1e-2, 0.1]]


# -------------------------------------------------------------------------------------------------------------- the maths


def test_stacked_heads_equal_each_head_alone_forward_and_backward():
    torch.manual_seed(0)
    heads = AttentiveHeads(AttentiveHead(WIDTH, 4, 5), 3).double()
    alone = []
    for number in range(3):
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter[number].add_(torch.randn_like(parameter[number]))
        head = AttentiveHead(WIDTH, 4, 5).double()
        head.load_state_dict(heads.state_of(number))
        alone.append(head)
    tokens, labels = torch.randn(6, 9, WIDTH, dtype=torch.float64), torch.randint(0, 5, (6,))
    logits_GBK = heads(tokens)
    sum(torch.nn.functional.cross_entropy(logits, labels) for logits in logits_GBK).backward()
    for number, head in enumerate(alone):
        logits = head(tokens)
        torch.testing.assert_close(logits_GBK[number], logits, rtol=0, atol=1e-12)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        for name, parameter in head.named_parameters():
            found = getattr(heads, name.replace(".", "_")).grad[number]
            assert (found - parameter.grad).norm() <= 1e-13 * parameter.grad.norm(), (number, name)


def test_each_point_steps_as_adamw_of_its_own_and_clips_by_its_own_norm():
    torch.manual_seed(1)
    optims = grid_points(Optimizer(steps=12, warmup_steps=3, warmup_lr=0.0, decoupled=False, clip=3.0, betas=[0.9, 0.999]), GRID)
    stacked = [torch.nn.Parameter(torch.randn(shape).expand(4, *shape).clone()) for shape in ((7,), (3, 5))]
    ours, placement, runs = GridAdamW(stacked, optims), Placement("single", "fp32"), []
    for g, optim in enumerate(optims):
        parameters = [torch.nn.Parameter(p[g].detach().clone()) for p in stacked]
        groups = parameter_groups([(str(i), p) for i, p in enumerate(parameters)], {"0": "weight", "1": "weight"}, optim, {})
        runs.append((parameters, build_optimizer(groups, optim)))
    for step in range(12):
        gradients = [torch.randn_like(p) * 10 ** torch.arange(-2.0, 2.0).view(4, *[1] * (p.dim() - 1)) for p in stacked]  # some are clipped, some not
        if step == 5:
            gradients[1][2, 0, 0] = torch.nan  # one point skips, the others do not see it
        for p, gradient in zip(stacked, gradients, strict=True):
            p.grad = gradient.clone()
        ours.param_groups[0]["lr"] = ours.rates(step)
        placement.step(torch.nn.Module(), ours, 3.0)
        for g, (parameters, optimizer) in enumerate(runs):
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient[g].clone()
            optimizer.param_groups[0]["lr"] = learning_rate(step, optims[g])
            placement.step(torch.nn.Module(), optimizer, 3.0)
        for g, (parameters, _) in enumerate(runs):
            for p, stack in zip(parameters, stacked, strict=True):
                torch.testing.assert_close(stack[g].detach(), p.detach(), rtol=1e-6, atol=1e-7)
    assert ours.state[stacked[0]]["step"].tolist() == [12, 12, 11, 12]


@pytest.mark.parametrize("policy", ["none", "rand-m9-mstd0.5-inc1"])
def test_each_point_of_a_grid_is_its_separate_run(colors, encoder_path, tmp_path, policy):  # noqa: F811
    recipe = a_recipe(encoder_path, colors, tmp_path / "grid", policy=policy, steps=12)
    recipe.optim.warmup_steps, recipe.grid = 3, GRID
    found = probing._train_and_judge(recipe, False, {}, kept=2)
    rows = [json.loads(line) for line in (tmp_path / "grid" / "metrics.jsonl").read_text().splitlines()]
    for number, (lr, weight_decay) in enumerate(GRID):
        one = copy.deepcopy(recipe)
        one.grid, one.out, one.optim.lr, one.optim.weight_decay = [], str(tmp_path / str(number)), lr, weight_decay
        result = probing.probe(one)
        curve = [json.loads(line)["loss"] for line in (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()]
        ours = [row[f"lr_{lr:g}_wd_{weight_decay:g}_loss"] for row in rows]
        assert all(abs(a - b) <= 2e-6 * max(1.0, b) for a, b in zip(ours, curve, strict=True)) and ours[-1] != ours[0]
        assert found[number]["loss"] == pytest.approx(result["loss"], abs=2e-6) and found[number]["num_correct"] == result["num_correct"]
        assert (found[number]["lr"], found[number]["weight_decay"]) == (lr, weight_decay)
        if number == 2:
            kept, alone = (load_file(tmp_path / name / "final" / "probe.safetensors") for name in ("grid", "2"))
            for name in alone:
                torch.testing.assert_close(kept[name], alone[name], rtol=1e-5, atol=1e-6)
    assert len({round(one["loss"], 6) for one in found}) == 4


def test_a_grid_goes_on_bit_for_bit_and_another_grid_is_refused(colors, encoder_path, tmp_path):  # noqa: F811
    def run(place: str, stop: int | None = None, grid: list | None = None) -> list:
        recipe = a_recipe(encoder_path, colors, tmp_path / place, policy="rand-m9-mstd0.5-inc1", steps=12)
        recipe.grid, recipe.train.stop_after = grid or GRID, stop
        return probing._train_and_judge(recipe, False, {}, kept=1)

    whole = run("whole")
    with pytest.raises(Stopped):
        run("cut", stop=5)
    with pytest.raises(UserError, match="another recipe.*grid"):
        run("cut", grid=GRID[:2])
    assert run("cut") == whole
    first, second = (load_file(tmp_path / place / "checkpoints" / "step_00000012" / "model-00001-of-00001.safetensors") for place in ("whole", "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.head.key_weight"].shape == (4, WIDTH, WIDTH) and not torch.equal(first["model.head.query"][0], first["model.head.query"][1])


def test_the_encoder_sees_each_batch_once_for_all_points(colors, encoder_path, tmp_path, monkeypatch):  # noqa: F811
    from aimv2_vlm.models.backbone import Backbone

    seen, forward = [], Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, pixels: seen.append(len(pixels)) or forward(self, pixels))
    recipe = a_recipe(encoder_path, colors, tmp_path / "run", policy="rand-m9-mstd0.5-inc1", steps=5)
    recipe.grid = GRID
    probing._train_and_judge(recipe, False, {})
    assert sum(seen) == 5 * 24 + 45


# -------------------------------------------------------------------------------------------------------- known data sets


def write_mirror(name: str, root: Path, layout: str) -> tuple[int, int]:
    """A miniature of a published set; returns (train, test) pictures. Rows of other splits lie beside them."""
    shades = itertools.count()

    def content(kind: str = "PNG", size: tuple[int, int] = (16, 12)) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(next(shades)).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, kind)
        return file.getvalue()

    def put(path: str, data: bytes | str | None = None) -> None:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data.encode() if isinstance(data, str) else content() if data is None else data)

    if layout == "folder":
        for split, count in (("train", 3), ("val" if name in ("imagenet-1k", "inat-18") else "test", 2)):
            for label in "ab":
                for number in range(count):
                    put(f"{split}/{label}/{number}.png")
        return 6, 4
    if layout == "parquet":
        import pyarrow
        import pyarrow.parquet

        about = recognition.DATA_SETS[name]
        names = {"cifar-10": ("img", "label"), "cifar-100": ("img", "fine_label")}.get(name, ("image", "label"))
        features = {names[1]: {"names": ["a", "b"], "_type": "ClassLabel"}, "domain": {"names": ["clipart", "infograph"], "_type": "ClassLabel"}}
        for split, count in (("train", 3), (about.test_names[-1], 2)):
            rows = {names[0]: [{"bytes": content(), "path": None} for _ in range(4 * count)], names[1]: [0, 1] * 2 * count,
                    "domain": [0] * 2 * count + [1] * 2 * count}
            if name == "pcam":
                rows[names[1]] = [bool(i) for i in rows[names[1]]]
            (root / "data").mkdir(parents=True, exist_ok=True)
            table = pyarrow.table(rows).replace_schema_metadata({} if name == "pcam" else {"huggingface": json.dumps({"info": {"features": features}})})
            pyarrow.parquet.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
        return (6, 4) if name == "infograph" else (12, 8)
    if name == "food101":
        for split, numbers in (("train", (1, 2, 3)), ("test", (4, 5))):
            put(f"food-101/meta/{split}.txt" if split == "test" else f"food-101/meta/{split}.json",
                "\n".join(f"{c}/{n}" for c in ("apple_pie", "waffles") for n in numbers) if split == "test"
                else json.dumps({c: [f"{c}/{n}" for n in numbers] for c in ("apple_pie", "waffles")}))
            for label, number in itertools.product(("apple_pie", "waffles"), numbers):
                put(f"food-101/images/{label}/{number}.jpg", content("JPEG"))
    elif name == "dtd":
        for part in ("train1", "val1", "test1", "train2"):
            put(f"dtd/labels/{part}.txt", "\n".join(f"{c}/{c}_{part}.jpg" for c in ("banded", "dotted")))
            for label in ("banded", "dotted"):
                put(f"dtd/images/{label}/{label}_{part}.jpg", content("JPEG"))
        return 4, 2
    elif name == "pets":
        for part, numbers in (("trainval", (1, 2, 3)), ("test", (4, 5))):
            put(f"annotations/{part}.txt", "#Image CLASS-ID SPECIES BREED\n" + "\n".join(f"{c}_{n} 1 1 1" for c in ("Abyssinian", "great_pyrenees") for n in numbers))
            for label, number in itertools.product(("Abyssinian", "great_pyrenees"), numbers):
                put(f"images/{label}_{number}.jpg", content("JPEG"))
    elif name == "eurosat":
        for split, numbers in (("train", (1, 2, 3)), ("val", (9,)), ("test", (4, 5))):
            put(f"eurosat-{split}.txt", "\n".join(f"{c}_{n}.jpg" for c in ("AnnualCrop", "SeaLake") for n in numbers))
            for label, number in itertools.product(("AnnualCrop", "SeaLake"), numbers):
                put(f"2750/{label}/{label}_{number}.jpg", content("JPEG"))
    elif name == "infograph":
        for split, numbers in (("train", (1, 2, 3)), ("test", (4, 5))):
            put(f"infograph_{split}.txt", "\n".join(f"infograph/{c}/infograph_{n}.jpg {i}" for i, c in enumerate(("airplane", "the_eiffel_tower")) for n in numbers))
            for label, number in itertools.product(("airplane", "the_eiffel_tower"), numbers):
                put(f"infograph/{label}/infograph_{number}.jpg", content("JPEG"))
    elif name == "inat-18":
        for split, numbers in (("train", range(6)), ("val", range(6, 10))):
            images = [{"id": n, "file_name": f"train_val2018/Aves/{n % 2}/{n}.jpg"} for n in numbers]
            put(f"{split}2018.json", json.dumps({"images": images, "annotations": [{"image_id": n, "category_id": n % 2} for n in numbers]}))
            for image in images:
                put(image["file_name"], content("JPEG"))
    elif name == "cars":
        from scipy.io import savemat

        for split, count, file in (("train", 6, "devkit/cars_train_annos.mat"), ("test", 4, "cars_test_annos_withlabels.mat")):
            rows = np.array([[(1, 2, 3, 4, n % 2 + 1, f"{n:05d}.jpg") for n in range(count)]],
                            dtype=[(c, object) for c in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")])
            (root / "stanford_cars" / "devkit").mkdir(parents=True, exist_ok=True)
            savemat(root / "stanford_cars" / file, {"annotations": rows})
            for n in range(count):
                put(f"stanford_cars/cars_{split}/{n:05d}.jpg", content("JPEG"))
    elif name in ("cifar-10", "cifar-100"):
        draws, coarse = np.random.default_rng(0), name == "cifar-100"
        files = [(f, 2) for f in recognition._CIFAR10["train"]] + [("test_batch.bin", 4)] if not coarse else [("train.bin", 6), ("test.bin", 4)]
        place = "cifar-100-binary" if coarse else "cifar-10-batches-bin"
        for file, count in files:
            put(f"{place}/{file}", b"".join(bytes([9] * coarse + [n % 2]) + draws.integers(0, 256, 3072, dtype=np.uint8).tobytes() for n in range(count)))
        put(f"{place}/{'fine_label_names.txt' if coarse else 'batches.meta.txt'}", "airplane\nautomobile\n\n")
        return (6, 4) if coarse else (10, 4)
    elif name == "camelyon17":
        lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
        wanted = [("0", "0")] * 6 + [("1", "0")] * 4 + [("2", "0"), ("0", "1"), ("3", "1")]
        for n, (center, split) in enumerate(wanted):
            lines.append(f"{n},{n:03d},4,{n},7,{n % 2},0,{center},{split}")
            put(f"camelyon17_v1.0/patches/patient_{n:03d}_node_4/patch_patient_{n:03d}_node_4_x_{n}_y_7.png")
        put("camelyon17_v1.0/metadata.csv", "\n".join(lines))
    elif name == "rxrx1":
        lines = ["site_id,well_id,cell_type,experiment,plate,well,site,well_type,sirna,sirna_id,dataset"]
        for dataset, numbers in (("train", range(6)), ("val", range(2)), ("test", range(2))):
            for n, site in itertools.product(numbers, (1, 2)):
                lines.append(f"x,y,HUVEC,{dataset.upper()}-01,2,B{n:02d},{site},treatment,s{n % 2},{n % 2},{dataset}")
                put(f"rxrx1_v1.0/images/{dataset.upper()}-01/Plate2/B{n:02d}_s{site}.png")
        put("rxrx1_v1.0/metadata.csv", "\n".join(lines))
    elif name == "fmow":
        lines, rows = ["split,img_filename,category,timestamp,country_code"], []
        for split, years in (("train", (2002, 2005, 2008, 2012, 2012, 2009, 2013)), ("val", (2013, 2014, 2015, 2015, 2016, 2012)), ("seq", (2014, 2010))):
            rows += [(split, year) for year in years]
        for n, (split, year) in enumerate(rows):
            lines.append(f"{split},a_{n}.jpg,{('airport', 'zoo')[n % 2]},{year}-12-31T23:59:59Z,USA")
            put(f"fmow_v1.1/images/rgb_img_{n}.png")
        put("fmow_v1.1/rgb_metadata.csv", "\n".join(lines))
    return 6, 4


OWN = [name for name, about in recognition.DATA_SETS.items() if about.own is not None]
MIRRORS = [*((name, "own") for name in OWN), *((name, "parquet") for name in recognition.DATA_SETS),
           ("imagenet-1k", "folder"), ("pcam", "folder"), ("inat-18", "folder"), ("eurosat", "folder")]


@pytest.mark.parametrize("name,layout", MIRRORS, ids=[f"{n}-{layout}" for n, layout in MIRRORS])
def test_published_sets_are_read_as_they_lie_and_their_counts_compared(name, layout, tmp_path):
    counts = write_mirror(name, tmp_path, layout)
    splits = open_splits(LabelledData(path=str(tmp_path), name=name), 0)
    assert (len(splits.train), len(splits.test)) == counts and len(splits.classes) == 2 and splits.selection
    assert all(Image.open(io.BytesIO(p.read())).size[0] > 0 for p in [*splits.train, *splits.test])
    assert {p.label for p in splits.test} == set(splits.classes)
    about = recognition.DATA_SETS[name]
    wanted = f"train {counts[0]} instead of {about.train:,}; test {counts[1]} instead of {about.test:,}"
    assert splits.report["differs_from_published"] == wanted + ("" if about.classes == 2 else f"; classes 2 instead of {about.classes:,}")
    assert recognition.split_differs(name, about.train, about.test, about.classes) == ""


def test_the_table_is_the_papers():
    total = {key: sum(getattr(about, key) for about in recognition.DATA_SETS.values()) for key in ("train", "test", "classes")}
    assert len(recognition.DATA_SETS) == 14 and total == {"train": 2_644_292, "test": 251_689, "classes": 11_193}


def test_sets_that_are_not_there_are_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, word in (("cifar-10", "holds pickles"), ("food101", r"looked for train/<class>/\*, train-\*.parquet, images/ and meta/train.txt"),
                       ("foot101", "did you mean food101")):
        with pytest.raises(UserError, match=word) as error:
            read_split(LabelledData(path=str(tmp_path), name=name), "train")
        assert "\n" not in str(error.value)


def test_a_set_may_be_used_as_it_was_published_with_pictures_of_test_in_train(tmp_path):
    root = write_folder(tmp_path, {"train": 4, "test": 3})
    (root / "train" / "blue" / "leak.png").write_bytes((root / "test" / "blue" / "0.png").read_bytes())
    kept = open_splits(LabelledData(path=str(root), duplicates="keep"), 0)
    assert len(kept.train) == 13 and kept.report["duplicates_kept_in_train"] == 1 and not kept.report["duplicates_dropped_from_train"]


# --------------------------------------------------------------------------------------------------------------- the verb


def test_eval_probes_models_on_sets_into_a_ledger_that_goes_on(encoder_path, tmp_path):  # noqa: F811
    write_folder(tmp_path / "colors", {"train": 12, "test": 5})
    write_mirror("dtd", tmp_path / "dtd", "own")
    config = tmp_path / "probes.yaml"
    config.write_text(f"""
kind: probing
out: {tmp_path}/out
precision: fp32
models:
  - {{name: whole, path: {encoder_path}}}
  - {{name: block 0, path: {encoder_path}, layer: 0, image_size: 42}}
data_sets:
  - {{path: {tmp_path}/colors}}
  - {{name: dtd, path: {tmp_path}/dtd, batch_size: 4}}
lrs: [1e-5, 1e-2]
weight_decays: [0.05]
optim: {{epochs: 8, batch_size: 12, warmup_steps: 0}}
augment: {{policy: none}}
train: {{num_workers: 0, trackers: []}}
""", encoding="utf-8")
    done = run_cli("eval", config)
    rows = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert [(row["model"], row["benchmark"]) for row in rows] == list(itertools.product(("whole", "block 0"), ("colors", "dtd")))
    assert "the split differs from the published one: train 4 instead of 3,760" in done.stdout + done.stderr
    first = rows[0]
    assert first["lr"] == 1e-2 and first["score"] <= first["best_on_test"]["score"] and first["interval"][0] <= first["score"] <= first["interval"][1]
    assert first["split_sizes"] == {"trained_on": 36, "selection": 3, "test": 15} and first["num_questions"] == 15 and first["metric"] == "top-1"
    assert first["features"] == "4 patches, last layer, normalised" and rows[2]["features"] == "9 patches, block 0, not normalised"
    assert first["versions"]["torch"] and len(first["data_hash"]) == 64 and first["tokens_per_picture"] == 4
    assert rows[1]["batch_size"] == 4 and "2,068" not in rows[1]["differs_from_published"] and "47" in rows[1]["differs_from_published"]
    # a killed evaluation lost its last row and half of the one before: both come back, the others stay
    lines = (tmp_path / "out" / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "ledger.jsonl").write_text("".join(lines[:2]) + lines[2][:50])
    again = run_cli("eval", config)
    assert "2 finished before" in again.stdout + again.stderr
    after = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert [row | {"seconds": 0} for row in after] == [row | {"seconds": 0} for row in rows]
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"best on test {first['best_on_test']['score']:.1f}" in report and f"| whole | colors | test | top-1 | {first['score']:.1f} |" in report
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Further scores" in page and "None" not in page and "prompt" not in page
    # what is not there fails, and keeps its rows
    done = run_cli("eval", config, "models.1.path=nowhere", check=False)
    assert done.returncode == 1 and "nowhere: no such file or folder" in (tmp_path / "out" / "failed.jsonl").read_text()
    (tmp_path / "colors").rename(tmp_path / "elsewhere")
    planned = run_cli("eval", "--plan", config, check=False)
    assert planned.returncode == 1 and "MISSING colors" in planned.stdout and "ok      dtd" in planned.stdout and "train 4 of 3,760" in planned.stdout
    done = run_cli("eval", config, check=False)
    assert done.returncode == 1 and "no split 'train'" in (tmp_path / "out" / "failed.jsonl").read_text()
    (tmp_path / "elsewhere").rename(tmp_path / "colors")
    assert run_cli("eval", "--plan", config).stdout.endswith("plan: all 4 things are there\n")
    kept = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert [row | {"seconds": 0} for row in kept] == [row | {"seconds": 0} for row in rows]
    # other pictures under the same path are other data
    pictures = sorted((tmp_path / "colors" / "test").rglob("*.png"))
    pictures[0].write_bytes(pictures[-1].read_bytes())
    done = run_cli("eval", config)
    after = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert "2 finished before" in done.stdout + done.stderr
    assert [(row["model"], row["benchmark"]) for row in after] == [(row["model"], row["benchmark"]) for row in rows], "in the config's order"
    assert {row["key"] for row in after if row["benchmark"] == "dtd"} == {row["key"] for row in rows if row["benchmark"] == "dtd"}
    assert not {row["data_hash"] for row in after if row["benchmark"] == "colors"} & {row["data_hash"] for row in rows}
    done = run_cli("eval", config, "kind=guessing", check=False)
    assert done.returncode == 2 and "kind: 'guessing' is none of benchmarks, probing, zero_shot" in done.stderr


def test_two_processes_probe_as_one(encoder_path, tmp_path):  # noqa: F811
    """Rows, statistics of the norm, choice and judgement are those of a single process."""
    write_folder(tmp_path / "colors", {"train": 12, "test": 5})
    (tmp_path / "colors" / "test" / "red" / "3.png").write_bytes(b"no picture")
    results = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        words = ["eval", "table3_probing", f"out={out}", "precision=fp32", f"models=[{{name: whole, path: {encoder_path}}}]",
                 f"data_sets=[{{path: {tmp_path}/colors, max_bad_fraction: 0.5}}]", "lrs=[1e-3, 1e-2]", "weight_decays=[0.05]", "augment.policy=none",
                 "optim={lr: 1e-3, epochs: 4, batch_size: 12, warmup_steps: 0}", "warmup_epochs=0", "train.log_every=1", "train.num_workers=0", "train.trackers=[]"]  # fmt: skip
        run_cli(*words, *(["--processes", "2"] if processes == 2 else []), check=False)
        [row] = [json.loads(line) for line in (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
        [found] = out.glob("runs/*/result.json")
        [losses] = [[json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("runs/*/test_grid/metrics.jsonl")]
        results.append((row, json.loads(found.read_text()), [line["loss"] for line in losses if "loss" in line]))
    (one, chosen_one, losses_one), (two, chosen_two, losses_two) = results
    same = ("score", "interval", "best_on_test", "selection_score", "lr", "num_questions", "num_errors", "split_sizes", "tokens_per_picture")
    assert {key: one[key] for key in same} == {key: two[key] for key in same} and one["num_errors"] == 1 and one["num_questions"] == 14
    assert chosen_one["selected"]["loss"] == pytest.approx(chosen_two["selected"]["loss"], rel=1e-5)
    assert len(losses_one) == len(losses_two) == 12
    torch.testing.assert_close(torch.tensor(losses_one), torch.tensor(losses_two), rtol=2e-6, atol=2e-6)


def test_a_named_set_has_its_own_splits_and_the_column_that_was_asked_for(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write_folder(tmp_path / "one", {"train": 1, "test": 1})
    content = next((tmp_path / "one").rglob("*.png")).read_bytes()
    root = tmp_path / "cifar"
    root.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"img": [content], "fine_label": ["7"], "coarse_label": ["2"]}), root / "test-00000-of-00001.parquet")
    assert read_split(LabelledData(str(root), name="cifar-100"), "test")[0].label == "7"
    assert read_split(LabelledData(str(root), name="cifar-100", label_column="coarse_label"), "test")[0].label == "2"
    with pytest.raises(UserError, match="data.test: 'validation', but cifar-100 has its own splits; remove the key, or data.name"):
        read_split(LabelledData(str(root), name="cifar-100", test="validation"), "validation")
    (root / "test-00000-of-00001.parquet").rename(root / "test-00000-of-00002.parquet")
    with pytest.raises(UserError, match="1 of 2 parts of split 'test'; fetch the missing ones"):
        read_split(LabelledData(str(root), name="cifar-100"), "test")


def test_a_finished_probe_of_other_weights_is_not_reported(encoder_path, colors, tmp_path):  # noqa: F811
    encoder = shutil.copytree(encoder_path, tmp_path / "encoder")
    recipe = a_recipe(encoder, colors, tmp_path / "out", lr=1e-2)
    result = probing.probe(recipe)
    assert probing.probe(recipe) == result
    weights = load_file(encoder / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="finished with other weights of .*; bring them back, choose another out=, or begin anew with --restart"):
        probing.probe(recipe)
