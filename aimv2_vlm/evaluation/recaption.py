"""Synthetic captions: shards in, the same shards out with one more field in each sample's .json.

Every member keeps its bytes, the .json those in front of its new field; a sample without .json gets one. What a caption was
made with stands in `recaption.json` of the new folder. A shard appears when it is whole, and `<shard>.recaption.json` behind
it says so; a second call goes on with the first shard that has none. Several processes may share a folder, each with its own shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aimv2_vlm.config import UserError
from aimv2_vlm.data.shards import atomic_file, expand_pattern, scan_shard, write_json
from aimv2_vlm.evaluation.generation import Generator, Picture, Question, load_assistant
from aimv2_vlm.models.checkpoints import weights_digest

ABOUT = "recaption.json"


def recaption(
    shards: Any, out: str | os.PathLike, model: str, *, prompt: str, field: str, batch_size: int = 16, max_new_tokens: int = 64,
    precision: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Caption every picture of `shards` (a pattern) with `model` and write the shards to `out`.

    model: folder or hub name of any checkpoint that AutoModelForImageTextToText and AutoProcessor open. progress: called with
    (samples done, an estimate of all). Returns {"num_shards", "num_done_before", "num_captions", "num_bad", "bad", …}: a sample
    without caption (no picture, one that cannot be decoded, an empty answer) is copied as it is and named.
    Raises UserError: no shards, no model, other settings than those that `out` was begun with, a field that is there already.
    """
    paths, out = expand_pattern(shards), Path(out)
    if any(path.parent.resolve() == out.resolve() for path in paths):
        raise UserError(f"{out}: holds the shards that are read; give another folder for the new ones")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"{shards}: two shards have one name; caption them into two folders")
    if not field or not prompt.strip():
        raise UserError("--field and --prompt: must not be empty")
    settings = {"model": model, "weights": weights_digest(model), "prompt": prompt, "field": field, "max_new_tokens": max_new_tokens, "precision": precision, "decoding": "greedy"}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(out / ABOUT, settings)
    finished = {path: _finished(path, out) for path in paths}
    totals = {"num_shards": len(paths), "num_done_before": sum(report is not None for report in finished.values()), "num_captions": 0, "num_bad": 0}
    bad: list[str] = []
    generator: Generator | None = None
    for number, path in enumerate(paths):
        report = finished[path]
        if report is None:
            if generator is None:
                generator = _open_generator(model, precision, batch_size, max_new_tokens)
                _write_about(out / ABOUT, settings, generator)
            tell = partial(_of_all, progress, totals["num_captions"] + totals["num_bad"], len(paths) - number)
            report = _caption_shard(path, out, field, prompt, generator, tell)
        totals["num_captions"] += report["num_captions"]
        totals["num_bad"] += len(report["bad"])
        bad += report["bad"]
    return {"out": str(out), **settings, **totals, "bad": bad}


def _of_all(progress: Callable[[int, int], None] | None, before: int, num_left: int, done: int, of: int) -> None:
    """A shard's progress as that of all: the shards that are left are taken to be as large as this one."""
    if progress is not None:
        progress(before + done, before + of * num_left)


def _caption_shard(path: Path, out: Path, field: str, prompt: str, generator: Generator, progress: Callable[[int, int], None]) -> dict[str, Any]:
    members, samples, damage = scan_shard(path)
    metadata = {member.offset: member.data for member in members if member.data is not None}
    bad = [f"{path.name}: (damage): {item.reason}" for item in damage]
    wanted = []
    for sample in samples:
        if sample.problems or sample.image is None:
            bad.append(f"{path.name}: {sample.key}: {'; '.join(sample.problems) or 'no picture'}")
            continue
        if sample.metadata is not None and field in json.loads(metadata[sample.metadata[0]]):
            raise UserError(f"{path}: {sample.key}: its .json has a field {field!r} already; choose another --field")
        wanted.append(sample)
    with open(path, "rb") as file:
        questions = [
            Question(prompt, (Picture((path.name, sample.order), partial(os.pread, file.fileno(), sample.image[1], sample.image[0])),))
            for sample in wanted
        ]
        num_done = 0

        def tell(count: int) -> None:
            nonlocal num_done
            num_done += count
            progress(num_done, len(wanted))

        answers = generator.answer(questions, on_progress=tell)
        fields: dict[int, dict[str, str]] = {}  # by offset of the .json, or of the picture where there is none
        for sample, answer in zip(wanted, answers, strict=True):
            if isinstance(answer, str) and answer.strip():
                fields[(sample.metadata or sample.image)[0]] = {field: answer.strip()}
            else:
                bad.append(f"{path.name}: {sample.key}: {'the model answered nothing' if isinstance(answer, str) else answer}")
        _copy(file, members, {sample.image[0]: sample.key for sample in wanted if sample.metadata is None}, fields, out / path.name)
    report = {"source": _identity(path), "num_captions": len(fields), "num_samples": len(samples), "bad": bad}
    write_json(_marker(path, out), report)
    return report


def _copy(file: Any, members: list, without_json: Mapping[int, str], fields: Mapping[int, dict[str, str]], target: Path) -> None:
    """All whole members in their order; a .json of `fields` (by offset) with its new field, a new one behind a picture without."""
    with atomic_file(target) as new, tarfile.open(fileobj=new, mode="w", format=tarfile.GNU_FORMAT) as tar:
        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))

        for member in members:
            if member.problem is not None:
                continue  # a link, or cut off: its sample is among the bad ones
            data = os.pread(file.fileno(), member.size, member.offset)
            more = fields.get(member.offset)
            key = without_json.get(member.offset)
            add(member.name, data if more is None or key is not None else with_fields(data, more))
            if more is not None and key is not None:
                add(f"{key}.json", json.dumps(more, ensure_ascii=False).encode())


def with_fields(data: bytes, fields: Mapping[str, Any]) -> bytes:
    """A JSON object in UTF-8 with more keys at its end; the bytes in front of them stay as they are."""
    body = data.rstrip()[:-1].rstrip()
    new = json.dumps(fields, ensure_ascii=False)[1:].encode()
    return body + (b"" if body.lstrip(b"\xef\xbb\xbf \t\r\n") == b"{" else b", ") + new


def _open_generator(model: str, precision: str, batch_size: int, max_new_tokens: int) -> Generator:
    return Generator(*load_assistant(model, precision), batch_size=batch_size, max_new_tokens=max_new_tokens)


def _check_settings(about: Path, settings: dict[str, Any]) -> None:
    """Raises UserError where the folder was begun with others: one folder, one kind of caption."""
    try:
        old = json.loads(about.read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{about}: cannot be read; remove it and the shards beside it, or choose another folder") from None
    changed = [f"{key} is {settings[key]!r}, was {old.get(key)!r}" for key in settings if settings[key] != old.get(key, settings[key])]
    if changed:
        raise UserError(f"{about.parent}: was begun with other settings ({'; '.join(changed)}); choose another folder")


def _write_about(about: Path, settings: dict[str, Any], generator: Generator) -> None:
    from aimv2_vlm.train.directory import versions

    config = generator.model.config
    model = {
        "class": type(generator.model).__name__, "dtype": str(generator.model.dtype).removeprefix("torch."),
        "revision": getattr(config, "_commit_hash", None), "config_sha256": hashlib.sha256(config.to_json_string().encode()).hexdigest(),
    }  # fmt: skip
    write_json(about, {"settings": settings, "model": model, "versions": versions()})


def _identity(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _marker(path: Path, out: Path) -> Path:
    return out / f"{path.stem}.recaption.json"


def _finished(path: Path, out: Path) -> dict[str, Any] | None:
    """What was told of a shard that is there already; None where it is to be made. Another shard of its name is made anew."""
    try:
        report = json.loads(_marker(path, out).read_text(encoding="utf-8"))
        same = report["source"] == _identity(path) and (out / path.name).is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if same else None
