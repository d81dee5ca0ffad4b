"""A contact sheet of some data: one HTML file with pictures, captions or conversations, that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aimv2_vlm.config import UserError
from aimv2_vlm.data.conversations import IMAGE, Conversation, ConversationSet
from aimv2_vlm.data.inspection import captions_of
from aimv2_vlm.data.interleaved import Document
from aimv2_vlm.data.shards import BadSample, ShardSet, atomic_file, open_index
from aimv2_vlm.data.transforms import BadImage, decode_image, read_header
from aimv2_vlm.page import page, picture_uri
from aimv2_vlm.page import text as harmless

THUMBNAIL = 480  # pixels of the longer side
LONGEST_TEXT = 2000  # characters shown of one caption or turn
MOST_BAD = 200  # bad samples listed by name

STYLE = """
:root { --page: #fbfaf7; --panel: #fff; --ink: #1d1f24; --soft: #5c6068; --rule: #dcdad3;
        --wrong: #b3261e; --wrong-back: #fbeae8; --own: #eef3f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --panel: #1d2024; --ink: #e9e7e2; --soft: #a5a8ae; --rule: #363a40;
          --wrong: #ff9a8f; --wrong-back: #3a1c1a; --own: #202a35; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 32px 24px; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
       font: 15px/1.45 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; }
header, main { max-width: 1400px; margin: 0 auto; }
h1 { font-size: 1.5rem; margin: 0 0 4px; }
h2 { font-size: 1.1rem; margin: 32px 0 8px; }
.soft { color: var(--soft); margin: 2px 0; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 14px; margin-top: 20px; align-items: start; }
.sheet.talk { grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
article { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
article > div { padding: 8px 12px 12px; }
.pictures { display: flex; flex-wrap: wrap; gap: 2px; padding: 0 !important;
            background: repeating-linear-gradient(45deg, #8885 0 5px, #8882 5px 10px); }
img { display: block; flex: 1 1 40%; min-width: 0; width: 100%; height: 220px; object-fit: contain; }
.talk img { height: 320px; }
.about, dt, summary { color: var(--soft); font-size: 0.76rem; }
dl { margin: 6px 0 0; }
dt { margin-top: 6px; }
dd { margin: 0; white-space: pre-wrap; }
.bad { border-color: var(--wrong); }
.reason { background: var(--wrong-back); color: var(--wrong); padding: 8px 12px; }
.turn { padding: 5px 9px; margin-top: 6px; border-radius: 6px; white-space: pre-wrap; border: 1px solid var(--rule); }
.turn.assistant { background: var(--own); margin-left: 24px; }
.turn b { display: block; font-weight: 500; color: var(--soft); font-size: 0.76rem; }
li { margin: 2px 0; }
"""


@dataclass(frozen=True)
class Card:
    """One sample: pictures (bytes), what stands above the texts, (label, text) pairs, less important fields, why it is bad."""

    pictures: Sequence[bytes]
    about: str
    texts: Sequence[tuple[str, str]] = ()
    fields: Sequence[tuple[str, str]] = ()
    reason: str | None = None
    turns: Sequence[tuple[str, str]] = ()


def quoted(value: Any) -> str:
    """Text from data as harmless HTML: escaped, cut, without control characters, its right-to-left marks kept to itself."""
    plain = str(value)
    if len(plain) > LONGEST_TEXT:
        plain = f"{plain[:LONGEST_TEXT]} … ({len(plain)} characters)"
    return f"<bdi>{harmless(plain)}</bdi>"


def thumbnail(data: bytes) -> str:
    """Picture bytes -> data URI of a JPEG whose longer side is at most THUMBNAIL pixels. Raises BadImage."""
    from PIL import Image

    return picture_uri(Image.fromarray(decode_image(data).permute(1, 2, 0).numpy()), THUMBNAIL, quality=82)


def render(card: Card) -> str:
    reason, shown, sizes = card.reason, [], []
    for data in card.pictures:
        try:
            header = read_header(data)
            shown.append(f'<img src="{thumbnail(data)}" alt="" loading="lazy">')
            sizes.append(f"{header.width} × {header.height} {header.extension}, {len(data) / 1000:.1f} kB")
        except BadImage as error:
            reason = error.reason if reason is None else f"{reason}; {error.reason}"
    parts = [f'<div class="pictures">{"".join(shown)}</div>'] if shown else []
    if reason is not None:
        parts.append(f'<div class="reason">bad: {quoted(reason)}</div>')
    lines = [f'<p class="about soft">{quoted(card.about)}</p>', *(f'<p class="about soft">{quoted(size)}</p>' for size in sizes)]
    if card.texts:
        lines.append("<dl>" + "".join(f"<dt>{quoted(label)}</dt><dd>{quoted(text)}</dd>" for label, text in card.texts) + "</dl>")
    lines += [f'<div class="turn {role}"><b>{role}</b>{quoted(text)}</div>' for role, text in card.turns]
    if card.fields:
        inner = "".join(f"<dt>{quoted(label)}</dt><dd>{quoted(text)}</dd>" for label, text in card.fields)
        lines.append(f"<details><summary>other fields</summary><dl>{inner}</dl></details>")
    return f"<article{' class=bad' if reason is not None else ''}>{''.join(parts)}<div>{''.join(lines)}</div></article>"


def write_page(
    out: str | Path, title: str, facts: Sequence[str], rendered: Sequence[str], bad: Sequence[str], look: str = "", style: str = STYLE, legend: str = ""
) -> dict:
    """Write the page atomically; returns {"path", "num_shown", "num_bad_shown", "num_bad"}.

    rendered: articles in HTML (`render`), bad ones of class bad. legend: HTML behind the facts.
    """
    left_out = ""
    if bad:
        more = f" (the first {MOST_BAD} of {len(bad)})" if len(bad) > MOST_BAD else f" ({len(bad)})"
        items = "".join(f"<li>{quoted(entry)}</li>" for entry in bad[:MOST_BAD])
        left_out = f"<h2>Left out, with the reason{more}</h2><ul>{items}</ul>"
    facts_html = "".join(f'<p class="soft">{quoted(fact)}</p>' for fact in facts)
    sheet = f'<div class="sheet {look}">\n' + "\n".join(rendered) + "\n</div>"
    whole = page(title, style, facts_html + legend, f"{sheet}\n{left_out}")
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(whole.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); choose another file") from None
    return {
        "path": str(path),
        "num_shown": len(rendered),
        "num_bad_shown": sum(article.startswith(('<article class=bad', '<article class="bad')) for article in rendered),
        "num_bad": len(bad),
    }


def draw_some(total: int, num: int, seed: int) -> list[int]:
    """`num` different positions out of `total`, in order; the same for the same seed."""
    if num < 1:
        raise UserError(f"--num {num}: must be at least 1")
    return sorted(int(n) for n in np.random.default_rng(seed).choice(total, min(num, total), replace=False))


def preview_shards(patterns: Any, out: str | Path, num: int = 64, seed: int = 0) -> dict:
    """`num` samples drawn from shards, each with all its captions, bad ones marked; what the index alone shows to be unusable has
    no position to be drawn and is listed.

    Raises UserError as ShardSet does, and when the shards hold nothing at all.
    """
    # Every text column counts here, so that no sample is left out for the column a recipe happens to use.
    columns = dict.fromkeys(["txt", *(c for path in ShardSet(patterns).paths for c in open_index(path)[0]["columns"])], 1.0)
    shards = ShardSet(patterns, columns)
    bad, starts = shards.bad_samples(), np.cumsum([0, *shards.num_samples])
    total = int(starts[-1])
    if not total and not bad:
        raise UserError(f"{patterns}: the shards hold no sample")
    cards = []
    for number in draw_some(total, num, seed):
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        sample = number - int(starts[shard])
        where = f"{shards.paths[shard].name}: {shards.key(shard, sample)}"
        try:
            _, data, text, metadata = shards.members(shard, sample)
        except BadSample as error:
            cards.append(Card([], where, reason=error.reason))
            continue
        captions, fields = captions_of(text, metadata)
        # The same words under several names (txt, json:caption, json:caption_0) are shown once; addresses, hashes and other
        # single words are fields, whatever their names.
        by_text: dict[str, list[str]] = {}
        for column, found in captions.items():
            for caption in found:
                if column in ("txt", "json:caption") or len(caption.split()) > 1:
                    by_text.setdefault(caption, []).append(column)
        shown = [(", ".join(dict.fromkeys(names)), caption) for caption, names in by_text.items()]
        above = {column for names in by_text.values() for column in names}
        others = [(name, str(value)) for name, value in fields.items() if f"json:{name}" not in above]
        cards.append(Card([data], where, shown, others, None if shown else "no caption"))
    facts = [f"{len(cards)} of {total} samples in {len(shards.paths)} shards, drawn with seed {seed}"]
    return write_page(out, f"{shards.paths[0].parent.name or 'shards'}: {len(cards)} samples", facts, list(map(render, cards)), bad)


def preview_conversations(sources: Sequence[Any], out: str | Path, num: int = 64, seed: int = 0) -> dict:
    """`num` conversations or documents drawn from files (`sources` as of ConversationSet), rejected rows listed."""
    rows = ConversationSet(list(sources))
    cards = []
    for number in draw_some(len(rows), num, seed):
        conversation = rows[number]
        pictures, reasons = [], []
        for path in rows.picture_paths(number):
            try:
                pictures.append(Path(path).read_bytes())
            except OSError as error:
                reasons.append(f"{path}: cannot be read ({error.strerror})")
        about = f"{Path(rows.where(number)).name}, id {conversation.id}" + "".join(f", {name}" for name in conversation.images)
        cards.append(Card(pictures, about, turns=_turns(conversation), reason="; ".join(reasons) or None))
    facts = [f"{len(cards)} of {len(rows)} usable conversations, drawn with seed {seed}", ", ".join(str(source.path) for source in sources)]
    facts += rows.report()["missing_folders"]
    return write_page(out, f"{Path(sources[0].path).stem}: {len(cards)} conversations", facts, list(map(render, cards)), rejected_rows(rows), "talk")


def _turns(conversation: Conversation | Document) -> list[tuple[str, str]]:
    if isinstance(conversation, Document):
        return [("document", "".join(IMAGE if piece is None else piece for piece in conversation.pieces))]
    return [("system", conversation.system)] * bool(conversation.system) + [(turn.role, turn.text) for turn in conversation.turns]


def rejected_rows(rows: ConversationSet) -> list[str]:
    """Rows that are left out, by name; those whose pictures are missing come last (the report has them by folder)."""
    rejected = sorted(rows.rejections(), key=lambda found: found[1].reason == "missing_picture")
    return [f"{Path(path).name}: row {item.row} (id {item.id}): {item.reason}" for path, item in rejected]
