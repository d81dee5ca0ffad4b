"""Two towers without training: classification by class names, retrieval by captions (paper 4.1, Table 5).

Models: those of the objectives clip and lit, Apple's LiT model, CLIP, SigLIP. Aimv2Model's text tower is made causal first: the stock
one is not whenever no row is padded, and its embeddings are others then.

Shapes: B batch, C channels, H, W picture, E embedding, K classes, I pictures, T texts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from aimv2_vlm import recipe as recipes
from aimv2_vlm.config import UserError, ZeroShotConfig, ZeroShotData, ZeroShotModel
from aimv2_vlm.data.captions import canonicalize, clean_caption
from aimv2_vlm.data.labelled import LabelledDataset, Picture, file_digest, read_split
from aimv2_vlm.data.recognition import find_data_set
from aimv2_vlm.data.transforms import EvalTransform
from aimv2_vlm.evaluation.cells import Cell, check_names, checkpoint_content, known_before, run_cells
from aimv2_vlm.evaluation.metrics import share_interval
from aimv2_vlm.evaluation.probing import content_hash, split_content
from aimv2_vlm.evaluation.sweep import digest_checkpoint
from aimv2_vlm.models.assistant import image_processor_values
from aimv2_vlm.models.backbone import PROCESSOR_FILES, open_whole
from aimv2_vlm.models.contrastive import make_text_causal
from aimv2_vlm.models.encoder import locate
from aimv2_vlm.train.directory import storage_errors, write_atomically
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.metrics import Progress
from aimv2_vlm.train.objectives import Normalization

CLASSES = {"aimv2": "Aimv2Model", "clip": "CLIPModel", "siglip": "SiglipModel"}  # by config.json's model_type
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "spiece.model")
RECALLS = (1, 5, 10)
IDLE = ("train", "selection", "judged", "duplicates", "max_bad_fraction")  # keys of labelled pictures that a probe needs; here bad ones are counted


class TwoTowers:
    """Pictures and texts of one checkpoint as unit vectors. `kind`: a key of CLASSES; `image_size`: of its pictures."""

    def __init__(self, path: str | Path, placement: Placement, canonical: bool | None = None, batch_size: int = 64):
        """Raises UserError for a checkpoint that is no two-tower model, not whole, or without its processor's files."""
        import transformers

        folder = locate(path, also=(*PROCESSOR_FILES, *TOKENIZER_FILES))
        self.kind = _kind(folder)
        model = open_whole(getattr(transformers, CLASSES[self.kind]), folder)  # Apple's own key layout: after `aimv2-vlm convert`
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise UserError(f"{folder}: its tokenizer cannot be opened ({(str(error).strip() or type(error).__name__).splitlines()[0]})") from None
        if self.kind == "aimv2":
            make_text_causal(model)
        self.model, self.placement, self.batch_size = model.to(placement.device).eval(), placement, batch_size
        self.canonical = _canonicalizes(folder) if canonical is None else canonical
        self.image_size = model.config.vision_config.image_size
        processor = image_processor_values(folder)
        self.normalize = Normalization(list(processor["image_mean"]), list(processor["image_std"]))
        # SigLIP's processor squashes a picture, those of AIMv2 and CLIP crop it.
        self.whole_pictures = isinstance(processor.get("size"), dict) and "height" in processor["size"] and not processor.get("do_center_crop")
        positions = model.config.text_config.max_position_embeddings
        # Apple's and CLIP's 77 positions are all for text; ours has one more than a text may have, for a pad.
        self.max_length = positions - 1 if self.kind == "aimv2" and positions != 77 else positions

    def tokens(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """`input_ids` (T, L) and `attention_mask` of texts, cut to what the tower takes; SigLIP's are filled up to its full length."""
        texts = [canonicalize(clean_caption(text)) if self.canonical else clean_caption(text) for text in texts]
        padding = "max_length" if self.kind == "siglip" else "longest"
        found = self.tokenizer(texts, padding=padding, truncation=True, max_length=self.max_length, split_special_tokens=True,
                               return_attention_mask=True, return_tensors="pt")
        return {key: found[key].to(self.placement.device) for key in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(T, E) float32 on the host."""
        parts = []
        for start in range(0, len(texts), self.batch_size):
            given = self.tokens(texts[start : start + self.batch_size])
            if self.kind != "clip":  # causal (AIMv2) or trained with pads in sight (SigLIP): no mask
                del given["attention_mask"]
            with self.placement.autocast():
                found = self.model.text_model(**given).pooler_output
                parts.append(found if self.kind == "siglip" else self.model.text_projection(found))
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    @torch.no_grad()
    def pictures(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) -> (B, E) float32 on the host."""
        pixels_BCHW = self.normalize(pixels_BCHW.to(self.placement.device))
        with self.placement.autocast():
            found = self.model.vision_model(pixel_values=pixels_BCHW).pooler_output
            found = found if self.kind == "siglip" else self.model.visual_projection(found)
        return F.normalize(found.float(), dim=-1).cpu()


def _kind(folder: Path) -> str:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no config.json of a two-tower model ({error})") from None
    if found not in CLASSES:
        raise UserError(f"{folder}: model_type {found!r} is none of {', '.join(CLASSES)}; zero-shot needs a picture and a text tower")
    return found


def _canonicalizes(folder: Path) -> bool:
    """Whether the run that the folder is `final/` of made its texts canonical."""
    saved = folder.parent / "recipe.yaml"
    return bool(saved.is_file() and (recipes.load_yaml(saved).get("text") or {}).get("canonicalize", False))


# -------------------------------------------------------------------------------------------------------------- evaluation


def evaluate(config: ZeroShotConfig, restart: bool = False) -> int:
    """`aimv2-vlm eval` of a zero-shot config: every model on every set into `<out>/ledger.jsonl`, each picture's outcome into
    `<out>/samples/`; returns the exit status."""
    placement = Placement("single", config.precision)
    models, data_sets = check_names(config.models, config.data_sets, config.out)
    for set_name, data in zip(data_sets, config.data_sets, strict=True):
        if idle := [key for key in IDLE if getattr(data, key) != getattr(ZeroShotData(), key)]:
            raise UserError(f"data_sets: {set_name}: {idle[0]} means nothing where nothing is trained; remove it")
    given = {}
    contents = {name: cache(partial(_content, data)) for name, data in zip(data_sets, config.data_sets, strict=True)}
    for model_name, model in zip(models, config.models, strict=True):
        checkpoint_read = cache(partial(checkpoint_content, model.path))
        for set_name, data in zip(data_sets, config.data_sets, strict=True):
            templates = read_templates(config.templates if data.templates is None else data.templates)
            files = [file_digest(Path(name)) for name in (data.class_names, data.captions) if name]
            known = known_before(checkpoint_read, contents[set_name])
            if not isinstance(known, UserError):
                known = [*known, model.canonicalize, recipes.to_dict(data), templates, files, config.crop_fraction, config.seed, placement.precision]
            given[Cell(model_name, set_name, known)] = (model, data, templates)
    opened: dict[str, TwoTowers] = {}  # one model at a time

    def run(cell: Cell) -> dict[str, Any]:
        model, data, templates = given[cell]
        if cell.model not in opened:
            opened.clear()
            opened[cell.model] = TwoTowers(model.path, placement, model.canonicalize, config.batch_size)
        towers = opened[cell.model]
        columns, samples = retrieve(towers, data, config) if data.captions else classify(towers, data, templates, config)
        file = Path(config.out) / "samples" / f"{cell.folder}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))
        return columns | _about(towers, model, data, config) | {"samples": f"samples/{file.name}"}

    with storage_errors(config.out):
        return run_cells(config.out, list(given), run, placement, "zero_shot", restart)


def _content(data: ZeroShotData) -> str:
    return content_hash(read_captions(data)[0]) if data.captions else split_content(data, data.test)


def _about(towers: TwoTowers, model: ZeroShotModel, data: ZeroShotData, config: ZeroShotConfig) -> dict[str, Any]:
    return {"model_path": model.path, "model_digest": digest_checkpoint(model.path), "encoder_kind": towers.kind, "image_size": towers.image_size,
            "canonicalize": towers.canonical, "tiling": None, "source_size": None, "tokens_per_picture": None, "data": data.path, "crop_fraction": _crop_fraction(towers, config),
            "seed": config.seed, "precision": towers.placement.precision}


def classify(towers: TwoTowers, data: ZeroShotData, templates: Sequence[str], config: ZeroShotConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(a ledger row's columns, each picture's outcome) of the test split: top-1 and top-5, intervals by bootstrap over pictures
    (Wilson's where all are right or all wrong)."""
    pictures = read_split(data, data.test)
    classes = sorted({picture.label for picture in pictures})
    names = read_class_names(data.class_names, classes)
    weights_KE = class_embeddings(towers, list(names.values()), templates)
    numbers = {label: number for number, label in enumerate(names)}
    images_IE, kept, bad = embed_pictures(towers, pictures, config)
    scores_IK = images_IE @ weights_KE.T
    labels = torch.tensor([numbers[pictures[i].label] for i in kept])
    ranks = ranks_of(scores_IK, labels)
    best, listed = scores_IK.argmax(-1).tolist(), list(names)
    samples = [{"name": pictures[i].name, "label": pictures[i].label, "prediction": listed[best[row]], "right": int(ranks[row] == 0)}
               for row, i in enumerate(kept)]
    clusters = [pictures[i].digest for i in kept]
    top = {k: _points((ranks < k).float().numpy(), clusters, config.seed) for k in (1, min(5, len(names)))}
    frequent = max(sum(picture.label == label for picture in pictures) for label in classes) / len(pictures)
    known = find_data_set(data.name) if data.name else None
    columns = {
        "metric": "top-1", "split": data.test, "score": top[1][0], "interval": top[1][1], "top_5": top[min(5, len(names))][0],
        "num_questions": len(kept), "num_errors": len(bad), "errors": bad[:100], "complete": not bad, "num_classes": len(names),
        "templates": list(templates), "majority_score": round(100 * frequent, 4), "data_hash": content_hash(pictures),
        "differs_from_published": f"test {len(pictures):,} instead of {known.test:,}" if known and len(pictures) != known.test else "",
    }
    return columns, samples


def retrieve(towers: TwoTowers, data: ZeroShotData, config: ZeroShotConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(a ledger row's columns, each picture's outcome): recall@1, 5, 10 from pictures to texts and from texts to pictures.

    A picture finds a text where any of its captions is among the first k, a text its picture. Intervals by bootstrap over pictures.
    """
    pictures, captions = read_captions(data)
    images_IE, kept, bad = embed_pictures(towers, pictures, config)
    texts = [text for i in kept for text in captions[i]]
    owner_T = torch.tensor([row for row, i in enumerate(kept) for _ in captions[i]])
    texts_TE = towers.texts(texts)
    to_text, to_image = retrieval_ranks(images_IE, texts_TE, owner_T)
    clusters = [pictures[i].digest for i in kept]
    recalls = {}
    for name, ranks, of in (("picture_to_text", to_text, clusters), ("text_to_picture", to_image, [clusters[o] for o in owner_T.tolist()])):
        for k in RECALLS:
            score, interval = _points((ranks < k).float().numpy(), of, config.seed)
            recalls[f"{name}@{k}"] = {"score": score, "interval": interval}
    samples = [{"name": pictures[i].name, "captions": captions[i], "first_own_caption": int(to_text[row])} for row, i in enumerate(kept)]
    first = recalls["picture_to_text@1"]
    columns = {
        "metric": "recall@1, picture to text", "split": data.split or data.test, "score": first["score"], "interval": first["interval"],
        "recalls": recalls, "num_questions": len(kept), "num_texts": len(texts), "num_errors": len(bad), "errors": bad[:100], "complete": not bad,
        "majority_score": None, "data_hash": content_hash(pictures),
    }
    return columns, samples


def _crop_fraction(towers: TwoTowers, config: ZeroShotConfig) -> float | None:
    """None: the whole picture is squashed."""
    return (None if towers.whole_pictures else 1.0) if config.crop_fraction is None else config.crop_fraction


def _points(scores: np.ndarray, clusters: Sequence[str], seed: int) -> tuple[float, list[float]]:
    low, high = share_interval(scores, clusters, seed)
    return round(100 * float(np.mean(scores)), 4), [round(100 * low, 4), round(100 * high, 4)]


def embed_pictures(towers: TwoTowers, pictures: Sequence[Picture], config: ZeroShotConfig) -> tuple[torch.Tensor, list[int], list[str]]:
    """(embeddings (I, E) of the pictures that can be decoded, their numbers, 'name: reason' of the others). UserError where none can."""
    size = towers.image_size
    fraction = _crop_fraction(towers, config)
    transform = EvalTransform(size, whole=True) if fraction is None else EvalTransform(size, int(size / fraction))
    rows = LabelledDataset(pictures, sorted({p.label for p in pictures}), 0, transform)
    parts, kept, bad = [], [], []
    bar = Progress("encoding pictures", len(pictures), enabled=towers.placement.is_main, unit="pictures")
    for start in range(0, len(pictures), config.batch_size):
        numbers = range(start, min(start + config.batch_size, len(pictures)))
        batch = rows.evaluation(numbers)
        good = batch["weights"] > 0
        if good.any():
            parts.append(towers.pictures(batch["pixels"][good]))
        kept += [number for number, is_good in zip(numbers, good.tolist(), strict=True) if is_good]
        bad += batch["bad"]
        bar.update(numbers[-1] + 1)
    bar.close()
    if not kept:
        raise UserError(f"data: none of {len(pictures)} pictures can be decoded (first: {bad[0]})")
    return torch.cat(parts), kept, bad


def class_embeddings(towers: TwoTowers, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """(K, E): of each class the mean over templates of its texts' unit vectors, made a unit vector."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    found = towers.texts(texts).unflatten(0, (len(names), len(templates)))
    return F.normalize(found.mean(1), dim=-1)


def ranks_of(scores_IK: torch.Tensor, right_I: torch.Tensor) -> torch.Tensor:
    """(I,): how many other columns score as high as the right one or higher. Ties count against: equal embeddings find nothing."""
    own = scores_IK.gather(1, right_I[:, None])
    return (scores_IK >= own).sum(1) - 1


def retrieval_ranks(images_IE: torch.Tensor, texts_TE: torch.Tensor, owner_T: torch.Tensor, chunk: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """(ranks (I,) of each picture's best own text among other pictures' texts, ranks (T,) of each text's picture), 0 the first."""
    to_text = []
    for start in range(0, len(images_IE), chunk):
        scores = images_IE[start : start + chunk] @ texts_TE.T
        is_own = owner_T == torch.arange(start, start + len(scores))[:, None]
        best = scores.masked_fill(~is_own, -math.inf).max(1, keepdim=True).values
        to_text.append(((scores >= best) & ~is_own).sum(1))
    to_image = [ranks_of(texts_TE[start : start + chunk] @ images_IE.T, owner_T[start : start + chunk]) for start in range(0, len(texts_TE), chunk)]
    return torch.cat(to_text), torch.cat(to_image)


# ------------------------------------------------------------------------------------------------------------------- texts


def read_templates(given: Any) -> list[str]:
    """A list of texts, or a file with one a line; each holds {} for the class's name. Raises UserError."""
    found = list(_lines(given, "templates")) if isinstance(given, str) else given
    if not isinstance(found, list) or not found:
        raise UserError(f"templates: {given!r}: expected a list of texts, or a file with one a line")
    if wrong := [text for text in found if not isinstance(text, str) or "{}" not in text]:
        raise UserError(f"templates: {wrong[0]!r} holds no {{}} for the class's name")
    return found


def read_class_names(file: str | None, classes: Sequence[str]) -> dict[str, str]:
    """Class of the data set -> its name in words. Without a file: what the set calls it, underscores and hyphens as spaces.

    file: a JSON mapping (or list, in the order of the sorted classes: 2 before 10 where all are numbers), or lines of `class<TAB>name`. It may name more classes than the
    pictures have: they compete too. Raises UserError where a class has no name, or only a number or a WordNet id, or the
    name of another.
    """
    if file is None:
        if wordless := [label for label in classes if re.fullmatch(r"[\d\W_]*|n\d{8}", label)]:
            raise UserError(f"class_names: null, but {', '.join(wordless[:4])} of the classes says nothing to a text tower; give a file of their names")
        return _told_apart({label: label.replace("_", " ").replace("-", " ") for label in classes}, "null")
    if file.endswith(".json"):
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"class_names: {file}: cannot be read ({error})") from None
        if isinstance(found, list):
            if len(found) != len(classes):
                raise UserError(f"class_names: {file}: {len(found)} names, but the pictures have {len(classes)} classes; write a mapping")
            ordered = sorted(classes, key=int) if all(label.isdecimal() for label in classes) else classes
            found = dict(zip(ordered, found, strict=True))
    else:
        found = dict(line.split("\t", 1) if "\t" in line else (line, "") for line in _lines(file, "class_names"))
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"class_names: {file}: expected a mapping of classes to names")
    if missing := [label for label in classes if not found.get(label)]:
        raise UserError(f"class_names: {file}: no name for {', '.join(missing[:4])}")
    return _told_apart(found, file)


def _told_apart(names: dict[str, str], source: str) -> dict[str, str]:
    """Raises UserError where two classes have one name: their scores tie, so neither would ever be right."""
    first: dict[str, str] = {}
    for label, name in names.items():
        if (other := first.setdefault(" ".join(name.lower().split()), label)) != label:
            raise UserError(f"class_names: {source}: classes {other} and {label} are both called {name!r}, which no text tower tells apart; give them names of their own")
    return names


def _lines(file: str, key: str) -> Iterator[str]:
    try:
        yield from (line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {file}: cannot be read ({error})") from None


def read_captions(data: ZeroShotData) -> tuple[list[Picture], list[list[str]]]:
    """(pictures, the captions of each) of a JSONL file; pictures lie below `data.path`, rows of one picture are put together.

    Raises UserError naming the line of a row without picture or caption.
    """
    root = Path(data.path)
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(data.captions, "captions"), start=1):
        try:
            row = json.loads(line)
            texts = row["captions"] if "captions" in row else [row["caption"]]
            wanted = all(str(row.get(key)) == value for key, value in data.where.items()) and (not data.split or row.get("split") == data.split)
            name = row["image"]
            if not isinstance(name, str) or not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                raise ValueError("image is a path, captions a list of texts")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{data.captions}, line {number}: no row of image and captions ({type(error).__name__}: {error})") from None
        if wanted:
            captions.setdefault(name, []).extend(texts)
    if not captions:
        raise UserError(f"{data.captions}: no row{' that split and where keep' if data.where or data.split else ''}")
    return [Picture(name, "", root / name, file_digest(root / name)) for name in captions], list(captions.values())
