"""What `aimv2-vlm data check`, `pack`, `preview` and `recaption` print; the work is done in inspection.py, shards.py, preview.py,
label_page.py and evaluation/recaption.py."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimv2_vlm.config import ConversationSource, SftRecipe, UserError

if TYPE_CHECKING:
    from aimv2_vlm.data.conversations import ConversationSet

NAMED = 20  # bad rows printed by name; --json and data_report.json have all
TOKENIZER_ROWS = 2000  # that a page's own tokenizer is trained on
LISTED = 5  # entries of any other list


def pack(arguments: argparse.Namespace) -> int:
    """A folder of pictures + captions -> image-text shards; exit status 1 when too many rows are bad."""
    from aimv2_vlm.data import shards

    where = {}
    for condition in arguments.where:
        key, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: write KEY=VALUE, e.g. --where split=train")
        where[key] = value
    report = shards.pack(arguments.folder, arguments.captions, arguments.out, arguments.samples_per_shard, where)
    _show(report, [f"{entry['row']}: {entry.get('image', '')}: {entry['reason']}" for entry in report["bad"]])
    return int(report["num_bad"] > arguments.max_bad_fraction * (report["num_written"] + report["num_bad"]))


def check(arguments: argparse.Namespace) -> int:
    """Count and validate shards or conversation files; exit status 1 when too many rows are bad or `--expect` is not met."""
    for_page = [f"--{name}" for name in ("llm", "recipe", "template", "grid") if getattr(arguments, name) is not None]
    if for_page and not arguments.page:
        raise UserError(f"{', '.join(for_page)}: say how --page is drawn; add --page FILE")
    if _are_conversations(arguments.paths):
        return check_conversations(arguments)
    if arguments.page:
        raise UserError("--page is for conversations; data preview shows shards")
    from aimv2_vlm.data import inspection, shards

    with _bar("reading samples", "samples") as progress:
        report = inspection.check(
            arguments.paths, shards.parse_caption(dict.fromkeys(arguments.caption or ["txt"], 1.0)), decode=arguments.decode,
            against=arguments.against, expect=arguments.expect, max_distance=_near_bits(arguments), progress=progress,
        )
    _write(arguments.json, report)
    _show(report, report["bad"])
    problems = report.get("expect", {}).get("problems", [])
    for problem in problems:
        print(f"expected of {arguments.expect}: {problem}")
    return int(bool(problems) or report["num_bad"] > arguments.max_bad_fraction * report["num_samples"])


def check_conversations(arguments: argparse.Namespace) -> int:
    from aimv2_vlm.data import inspection
    from aimv2_vlm.data.conversations import ConversationSet
    from aimv2_vlm.data.preview import rejected_rows

    if arguments.expect or arguments.caption:
        raise UserError(f"{arguments.paths[0]}: --expect and --caption are for shards, not for conversations")
    conversations = ConversationSet(_sources(arguments))
    report = conversations.report()
    bad = rejected_rows(conversations)
    num_bad = len(bad)
    if arguments.decode or arguments.against:
        paths = list(dict.fromkeys(path for number in range(len(conversations)) for path in conversations.picture_paths(number)))
        with _bar("reading pictures", "pictures") as progress:
            pictures = inspection.check_pictures(
                paths, decode=arguments.decode, against=arguments.against, max_distance=_near_bits(arguments), progress=progress)
        bad += pictures.pop("bad_pictures")
        num_bad += pictures["num_bad_pictures"]
        report["pictures"] = pictures
    _write(arguments.json, report | {"bad": bad})
    _show({key: value for key, value in report.items() if key != "missing_folders"}, bad)
    for line in report["missing_folders"]:
        print(f"missing: {line}")
    if arguments.page:
        _label_page(arguments, conversations)
    return int(num_bad > arguments.max_bad_fraction * report["rows"])


def _label_page(arguments: argparse.Namespace, conversations: ConversationSet) -> None:
    from tempfile import TemporaryDirectory

    from aimv2_vlm.config import IMAGENET_MEAN, IMAGENET_STD, SftRecipe
    from aimv2_vlm.data import chat, label_page
    from aimv2_vlm.data.collate import InstructionDataset
    from aimv2_vlm.data.tiling import Tiling, image_processor
    from aimv2_vlm.recipe import load_recipe

    # Only paths of data can stand behind data_root: the page takes none of them from the recipe.
    recipe = load_recipe("sft", arguments.recipe, ["data_root=."]) if arguments.recipe else SftRecipe()
    llm, kind = arguments.llm or recipe.llm.path, arguments.template or recipe.llm.template
    tile_size, patch_size, sizes_from = _encoder_sizes(recipe)
    with TemporaryDirectory() as folder:
        if llm is not None:
            tokenizer = chat.open_tokenizer(llm)
        else:
            texts = (text for index in range(min(len(conversations), TOKENIZER_ROWS)) for text in conversations[index].texts)
            tokenizer = chat.train_chat_tokenizer(texts, folder, recipe.llm.vocab_size, "plain" if kind == "own" else kind)
        image_token = chat.prepare_tokenizer(tokenizer)
        template = chat.chat_template(kind, image_token, tokenizer.chat_template)
        format_ = chat.ChatFormat(tokenizer, template, image_token)
    tiling = Tiling.parse(arguments.grid or recipe.tiling.grid, tile_size=tile_size, patch_size=patch_size, pad_square=recipe.tiling.pad_square,
                          source_size=recipe.tiling.source_size, unshuffle=recipe.tiling.unshuffle)
    longest = recipe.data.max_length if arguments.recipe else None
    own = f"one of {len(tokenizer):,} tokens trained on these rows, as a decoder from scratch gets; another decoder's (--llm) counts otherwise"
    about = [f"template {kind}; tokenizer: {llm or own}",
             f"grid {tiling}, {tile_size} px a view, patches of {patch_size} px{f', {tiling.unshuffle**2} of them a token' * (tiling.unshuffle > 1)} ({sizes_from}); {f'max_length {longest:,}' if longest else 'no row is cut'}"]
    # Which pixels are shown does not depend on the encoder's mean, only how they are normalised.
    data = InstructionDataset(conversations, format_, tiling, image_processor(tiling, IMAGENET_MEAN, IMAGENET_STD), max_length=longest)
    done = label_page.write_label_page(data, arguments.page, about, arguments.num, arguments.seed)
    print(f"{done['path']}: {done['num_shown']} rows shown, {done['num_bad_shown']} of them of weight 0")


def _encoder_sizes(recipe: SftRecipe) -> tuple[int, int, str]:
    """(pixels of a view, of a patch, where they are from): of the recipe's encoder where it is at hand."""
    try:
        config = json.loads((Path(recipe.encoder.path) / "config.json").read_text(encoding="utf-8"))
        return int(recipe.encoder.image_size or config["image_size"]), int(config["patch_size"]), f"of {recipe.encoder.path}"
    except (OSError, ValueError, KeyError, TypeError):
        return recipe.encoder.image_size or 336, 14, "of the recipe" if recipe.encoder.image_size else "assumed"


def annotations(arguments: argparse.Namespace) -> int:
    """COCO, LVIS or RefCOCO annotations -> JSON lines of one kind; exit status 1 when too many annotations are broken."""
    from aimv2_vlm.data.annotations import read_annotations

    taken = [arguments.path, arguments.instances or Path(arguments.path).with_name("instances.json"), arguments.json]
    if Path(arguments.out).resolve() in [Path(path).resolve() for path in taken if path]:
        raise UserError(f"{arguments.out}: is read or written for something else; give the rows a file of their own")
    found = read_annotations(arguments.form, arguments.path, arguments.images, arguments.instances, arguments.split)
    with _writing(arguments.out):
        found.write_jsonl(arguments.out)
    report = found.report()
    _write(arguments.json, report)
    examples = report.pop("broken_examples")
    _show(report, [f"{what}: {reason}" for reason, names in examples.items() for what in names])
    print(f"{arguments.out}: {report['num_images']:,} rows")
    return int(report["num_broken"] > arguments.max_bad_fraction * max(1, report["num_captions"] + report["num_boxes"] + report["num_broken"]))


def recaption(arguments: argparse.Namespace) -> int:
    """Shards -> shards with synthetic captions; exit status 1 when too many samples have none."""
    from aimv2_vlm.evaluation.recaption import recaption

    with _bar("captioning", "samples") as progress:
        report = recaption(
            arguments.shards, arguments.out, arguments.model, prompt=arguments.prompt, field=arguments.field, batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens, precision=arguments.precision, progress=progress)
    _show(report, report["bad"])
    return int(report["num_bad"] > arguments.max_bad_fraction * (report["num_captions"] + report["num_bad"]))


def preview(arguments: argparse.Namespace) -> int:
    """Write a contact sheet of shards or conversation files and say where it is."""
    from aimv2_vlm.data import preview

    if _are_conversations(arguments.paths):
        done = preview.preview_conversations(_sources(arguments), arguments.out, arguments.num, arguments.seed)
    else:
        done = preview.preview_shards(arguments.paths, arguments.out, arguments.num, arguments.seed)
    print(f"{done['path']}: {done['num_shown']} shown, {done['num_bad_shown']} of them bad; {done['num_bad']} left out and listed")
    return 0


def _near_bits(arguments: argparse.Namespace) -> int:
    from aimv2_vlm.data.duplicates import MAX_DISTANCE
    from aimv2_vlm.data.inspection import NEAR

    bits = NEAR if arguments.near_bits is None else arguments.near_bits
    if not 0 <= bits <= MAX_DISTANCE:
        raise UserError(f"--near-bits {bits}: must be from 0 (equal hashes) to {MAX_DISTANCE}")
    return bits


def _are_conversations(paths: list[str]) -> bool:
    named = [str(path).endswith((".json", ".jsonl", ".ndjson", ".parquet")) for path in paths]
    if any(named) and not all(named):
        raise UserError(f"{' '.join(paths)}: shards and conversation files in one call; name them in two")
    return all(named)


def _sources(arguments: argparse.Namespace) -> list[ConversationSource]:
    more = {"images": arguments.images, "format": arguments.format, "follow_links": arguments.follow_links}
    return [ConversationSource(path=path, **more) for path in arguments.paths]


class _bar:
    """A progress bar for a `with` block; gives the `progress(done, total)` callback."""

    def __init__(self, what: str, unit: str):
        from aimv2_vlm.train.metrics import Progress

        self._bar = Progress(what, 1, unit=unit)

    def __enter__(self):
        return self._bar.of

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def _write(path: str | None, report: dict) -> None:
    from aimv2_vlm.data.shards import write_json

    if path is None:
        return
    with _writing(path, "--json "):
        write_json(Path(path), report)


@contextlib.contextmanager
def _writing(path: str, option: str = "") -> Iterator[None]:
    """Folders above the file are made; where it cannot be written, one line says so."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{option}{path}: cannot be written ({error.strerror}); choose another file") from None


def _show(report: dict, bad: list[str]) -> None:
    """The report on standard output as JSON, long lists cut; then the bad rows by name."""
    text = json.dumps(_cut({key: value for key, value in report.items() if key != "bad"}), indent=1, ensure_ascii=False)
    # The quantiles of one thing on one line: an object of numbers, of which no text can be a part.
    print(re.sub(r'\{(\s*"[a-z0-9%]+": -?[0-9.]+,?)+\s*\}', lambda found: " ".join(found[0].split()), text))
    for entry in bad[:NAMED]:
        print(f"bad: {entry}")
    if len(bad) > NAMED:
        print(f"bad: … and {len(bad) - NAMED} more")


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cut(item) for item in value[:LISTED]] + ([f"… and {len(value) - LISTED} more"] if len(value) > LISTED else [])
    return value
