"""What a tuning run learns from some rows: one HTML page with each row's tokens coloured by what they are for, the views drawn
over its pictures, and token counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from aimv2_vlm.data.chat import IGNORED, ChatFormat
from aimv2_vlm.data.collate import InstructionDataset, Row
from aimv2_vlm.data.preview import STYLE, THUMBNAIL, draw_some, quoted, rejected_rows, write_page
from aimv2_vlm.data.tiling import Tiling
from aimv2_vlm.data.transforms import BadImage, decode_image
from aimv2_vlm.page import picture_uri

LABEL_STYLE = STYLE + """
:root { --learned: #cfe9d5; --learned-ink: #10401f; --image: #d5e3f7; --image-ink: #16375f; --tile: #e4570a; --overview: #1668d6; }
@media (prefers-color-scheme: dark) {
  :root { --learned: #1f4a2c; --learned-ink: #d5f2dc; --image: #1d3a5f; --image-ink: #d9e8fb; --tile: #ff8a4a; --overview: #7db4ff; }
}
.sheet.labels { grid-template-columns: minmax(0, 1fr); }
.labels article { display: grid; grid-template-columns: minmax(220px, 360px) minmax(0, 1fr); }
.labels article.text { grid-template-columns: minmax(0, 1fr); }
@media (max-width: 760px) { .labels article { grid-template-columns: minmax(0, 1fr); } }
.labels .pictures { flex-direction: column; gap: 8px; padding: 10px !important; background: none; border-right: 1px solid var(--rule); }
svg { display: block; width: 100%; max-height: 340px; background: repeating-linear-gradient(45deg, #8884 0 5px, #8882 5px 10px); }
rect { fill: none; stroke: var(--tile); stroke-width: 2; vector-effect: non-scaling-stroke; }
rect.overview { stroke: var(--overview); stroke-dasharray: 7 4; }
.count { margin: 2px 0 8px; font-variant-numeric: tabular-nums; }
.mask { white-space: pre-wrap; color: var(--soft); font: 13px/1.65 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.learned, .image { border-radius: 4px; padding: 1px 3px; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.learned { background: var(--learned); color: var(--learned-ink); }
.image { background: var(--image); color: var(--image-ink); }
.legend { margin: 8px 0 0; color: var(--soft); }
"""
LEGEND = (
    '<p class="legend"><span class="learned">supervised</span> is learned; plain text is the prompt, read and not learned; '
    '<span class="image">N image tokens</span> stand for one picture. {tiles}</p>'
)
TILES = "Over the pictures: tiles in orange, the overview dashed in blue; striped parts are padding."
ONE_VIEW = "Over the pictures: what the encoder sees, dashed in blue; striped parts are padding."


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one kind: learned | prompt | image (then one picture's)."""

    kind: str
    text: str
    num_tokens: int


def spans_of(row: Row, chat: ChatFormat, num_image_tokens: Sequence[int]) -> list[Span]:
    """A row's tokens by kind, in order; together they are the row. num_image_tokens: of each of its pictures."""
    def kind(place: int) -> str:
        if row.input_ids[place] == chat.image_token_id:
            return "image"
        return "prompt" if row.labels[place] == IGNORED else "learned"

    spans, counts = [], iter(num_image_tokens)
    for name, run in groupby(range(len(row.input_ids)), key=kind):
        places = list(run)
        if name != "image":
            spans.append(Span(name, chat.decode([row.input_ids[place] for place in places]), len(places)))
            continue
        rest = len(places)
        while rest > 0:
            count = next(counts)
            spans.append(Span(name, f"{count:,} image tokens", count))
            rest -= count
    return spans


def write_label_page(dataset: InstructionDataset, out: str | Path, about: Sequence[str] = (), num: int = 24, seed: int = 0) -> dict:
    """`num` rows of `dataset` as training takes them; rejected rows listed. about: lines about tokenizer and template.

    Returns {"path", "num_shown", "num_bad_shown", "num_bad"}. Raises UserError where the page cannot be written.
    """
    rows, total = dataset.conversations, Counter[str]()
    articles = [_article(dataset, index, total) for index in draw_some(len(rows), num, seed)]
    facts = [f"{len(articles)} of {len(rows):,} usable rows, drawn with seed {seed}; {_counted(total)}", *about, *rows.report()["missing_folders"]]
    title = f"{Path(rows.sources[0].path).name}: what is learned"
    legend = LEGEND.format(tiles=ONE_VIEW if dataset.tiling.single else TILES)
    return write_page(out, title, facts, articles, rejected_rows(rows), "labels", LABEL_STYLE, legend)


def _article(dataset: InstructionDataset, index: int, total: Counter[str]) -> str:
    rows, tiling = dataset.conversations, dataset.tiling
    row, conversation = dataset.fetch(index), rows[index]
    where = f"{Path(rows.where(index)).name}, id {conversation.id}"
    drawings, notes, counts = [], [], []
    for name, path in zip(conversation.images, rows.picture_paths(index), strict=True):
        try:
            drawing, (height, width) = _drawing(path, tiling)
        except BadImage:
            continue  # `row.bad` says so
        drawings.append(drawing)
        counts.append(tiling.num_image_tokens(height, width))
        chosen = tiling.at(height, width)
        tiles = "one view" if chosen.single else f"{chosen} tiles and an overview"
        notes.append(f"{name}: {width} × {height}, {tiles}, {counts[-1]:,} tokens")
    head = "".join(f'<p class="about soft">{quoted(line)}</p>' for line in (where, *notes))
    pictures = f'<div class="pictures">{"".join(drawings)}</div>' if drawings else ""
    look = "" if drawings else " text"
    if row.bad is not None:
        return f'<article class="bad{look}">{pictures}<div>{head}<div class="reason">of weight 0: {quoted(row.bad)}</div></div></article>'
    spans = spans_of(row, dataset.chat, counts)
    counted: Counter[str] = Counter()
    for span in spans:
        counted[span.kind] += span.num_tokens
    total.update(counted)
    cut = f"; {row.num_cut} turns or pieces at its end were cut off (max_length {dataset.max_length:,})" if row.num_cut else ""
    mask = "".join(quoted(span.text) if span.kind == "prompt" else f'<span class="{span.kind}">{quoted(span.text)}</span>' for span in spans)
    count = f'<p class="count">{_counted(counted)}{cut}</p>'
    return f'<article class="row{look}">{pictures}<div>{head}{count}<div class="mask">{mask}</div></div></article>'


def _counted(tokens: Counter[str]) -> str:
    whole = sum(tokens.values())
    share = f" ({tokens['learned'] / whole:.1%})" if whole else ""
    return f"{whole:,} tokens: {tokens['image']:,} of pictures, {tokens['prompt']:,} of prompts, {tokens['learned']:,} supervised{share}"


def _drawing(path: str, tiling: Tiling) -> tuple[str, tuple[int, int]]:
    """The picture with its views' frames, as inline SVG in the picture's own pixels, and its (height, width). Raises BadImage."""
    from PIL import Image

    try:
        pixels_CHW = decode_image(Path(path).read_bytes())
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from None
    height, width = pixels_CHW.shape[-2:]
    views = tiling.views(height, width)
    lefts, tops, rights, bottoms = zip((0, 0, width, height), *(view.box for view in views), strict=True)
    left, top, right, bottom = min(lefts), min(tops), max(rights), max(bottoms)
    frames = ""
    for view in sorted(views, key=lambda view: view.name == "overview"):  # drawn last: it lies over the outer edges
        x, y, x_end, y_end = view.box
        look = "overview" if view.name == "overview" else "tile"
        frames += f'<rect class="{look}" x="{x:.2f}" y="{y:.2f}" width="{x_end - x:.2f}" height="{y_end - y:.2f}"></rect>'
    uri = picture_uri(Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy()), THUMBNAIL, quality=82)
    margin = 0.01 * max(right - left, bottom - top)  # so that the outermost frames are whole
    box = f"{left - margin:.2f} {top - margin:.2f} {right - left + 2 * margin:.2f} {bottom - top + 2 * margin:.2f}"
    image = f'<image href="{uri}" x="0" y="0" width="{width}" height="{height}" preserveAspectRatio="none"></image>'
    return f'<svg viewBox="{box}">{image}{frames}</svg>', (height, width)
