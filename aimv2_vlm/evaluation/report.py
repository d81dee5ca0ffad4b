"""`report.html`: one file that opens without a network and shows what a chain of runs learned, with its controls; `report.md`: its scores.

    write_report("r.html", runs={"pre-training": "runs/l14", "tuning": "runs/sft"}, eval_dir="runs/eval", title="A")

Reads run directories (`metrics.jsonl`, `recipe.yaml`, `environment.json`, `data_report.json`, `checkpoints/`, `final/`)
and an evaluation directory (`ledger.jsonl`, `samples/*.jsonl`, and the benchmarks' parquet for pictures). Whatever is
missing is named in the report; nothing is guessed. All text that comes from data is escaped; a content security policy
in the page forbids scripts and requests besides.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aimv2_vlm.evaluation.charts import NUM_STYLES, Series, axis, legend, line_chart, marker
from aimv2_vlm.evaluation.findings import (
    LARGE_PRINT,
    MIN_BIN,
    SMALL_PRINT,
    Arm,
    Bin,
    Evaluation,
    Gain,
    Picture,
    PrintHeights,
    Run,
    choose_samples,
    control_scores,
    finite,
    further_scores,
    height_bins,
    read_json,
    read_pictures,
    resolution_gain,
    resolution_pairs,
    smooth,
    thin,
    uses_picture,
)
from aimv2_vlm.evaluation.paper import Beside, beside_the_paper, cell_words, escape, markdown
from aimv2_vlm.page import page, text
from aimv2_vlm.train.directory import write_atomically

STYLE = Path(__file__).with_name("report.css")
INTERVAL = "95\u00a0% interval"

# --------------------------------------------------------------------------------------------------- text into HTML


def quoted(value: Any) -> str:
    """Text from data, isolated so that right-to-left marks in it cannot turn the page's own words around."""
    return f"<bdi>{text(value)}</bdi>"


def points(value: float, sign: bool = False) -> str:
    """A score in points, with a true minus sign."""
    return (f"{value:+.1f}" if sign else f"{value:.1f}").replace("-", "\u2212")


def span(low: float, high: float, sign: bool = False) -> str:
    return f"{points(low, sign)} to {points(high, sign)}"


def duration(seconds: float) -> str:
    minutes, hours = divmod(round(seconds), 60)[0], round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.0f} s"


def plural(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def facts_table(rows: Iterable[tuple[str, Any]]) -> str:
    """Label and value, one pair a line."""
    body = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{body}</dl>'


def missing(reason: str) -> str:
    return f'<p class="missing">Not shown: {text(reason)}.</p>'


def table(look: str, columns: Iterable[str], body: str) -> str:
    """`columns` and `body` are HTML already."""
    head = "".join(f"<th scope=col>{column}</th>" for column in columns)
    return f'<table class="{look}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def scrolled(label: str, inner: str) -> str:
    """A table that may be wider than a phone: it scrolls, the page does not."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">{inner}</div>'


def folded_table(title: str, note: str, columns: Iterable[str], rows: str) -> str:
    """A table behind its title, opened by a click. `columns` and `rows` are HTML already."""
    return f'<details><summary>{title}</summary><p class="note">{note}</p>{scrolled(title.lower(), table("plain", columns, rows))}</details>'


def figure(name: str, title: str, chart: str, lines: Sequence[Series]) -> str:
    return f"<figure><figcaption><b>{text(name)}</b> {text(title)}</figcaption>{chart}{legend(lines)}</figure>"


def section(anchor: str, title: str, how: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{text(title)}</h2><p class="how">{how}</p>{body}</section>'


def arm_name(evaluation: Evaluation, arm: Arm) -> str:
    """The arm's mark, the same in tables, charts and samples, and its label."""
    mark = marker(evaluation.style(arm))
    return f'<svg class="key" viewBox="-6 -6 12 12" aria-hidden="true">{mark}</svg>{quoted(arm.label)}'


# --------------------------------------------------------------------------------------------------------- headline


def card(value: str, name: str, detail: str) -> str:
    return f'<div class="card"><p class="big">{text(value)}</p><h3>{text(name)}</h3><p>{text(detail)}</p></div>'


def _gain_words(gain: Gain) -> str:
    if gain.interval is None:
        return f"{plural(gain.num_questions, 'question')}; no interval, the samples are incomplete"
    low, high = gain.interval
    sure = "the interval excludes 0" if low > 0 or high < 0 else "the interval includes 0: no difference shown"
    return f"{INTERVAL} {span(low, high, True)} on {plural(gain.num_questions, 'question')}; {sure}"


def _picture_cards(evaluation: Evaluation) -> list[str]:
    gains = [(arm, uses_picture(evaluation, arm)) for arm in evaluation.arms if arm.source_size is None]
    known = sorted(((arm, gain) for arm, gain in gains if gain), key=lambda pair: -pair[1].value)
    if not known:
        return []
    arm, best = known[0]
    rest = "".join(f" {a.label}: {points(g.value, True)}." for a, g in known[1:4])
    detail = f"{arm.label}: score above the best of blind, wrong picture and most frequent answer; {_gain_words(best)}."
    return [card(f"{points(best.value, True)} points", "It uses the picture", detail + rest)]


def _resolution_cards(evaluation: Evaluation, heights: PrintHeights) -> list[str]:
    cards = []
    for real, upsampled in resolution_pairs(evaluation)[:2]:
        for name, limit, low, high in (
            ("small", f"under {SMALL_PRINT:g}", 0.0, SMALL_PRINT),
            ("large", f"from {LARGE_PRINT:g}", LARGE_PRINT, math.inf),
        ):
            gain = resolution_gain(heights, real, upsampled, low, high)
            if gain:
                detail = (
                    f"{real.label} with real tiles, minus the same tiles cut from reduced pictures; "
                    f"cap height {limit} px in one view. {_gain_words(gain)}."
                )
                cards.append(card(f"{points(gain.value, True)} points", f"Resolution on {name} print", detail))
    return cards


def _loss_cards(run: Run) -> list[str]:
    cards = []
    pixel, color, words = run.last("val_pixel_loss"), run.last("val_mean_color_loss"), run.curve("val_text_loss")
    if pixel is not None and color:
        share = 100 * abs(1 - pixel / color)
        verdict = f"the prediction explains {share:.0f} % of that" if pixel < color else f"it is worse by {share:.0f} %"
        detail = f"Painting every next patch in its true mean colour would give {color:.3f}; {verdict}."
        cards.append(card(f"{pixel:.3f}", f"Held-out pixel loss, {run.name}", detail))
    if words:
        (first_step, first), (_, last) = words[0], words[-1]
        detail = (
            f"Per caption token; {first:.2f} at step {first_step:,.0f}. "
            f"A guess among {math.exp(min(last, 50)):,.1f} equally likely tokens would score the same."
        )
        cards.append(card(f"{last:.2f} nats", f"Held-out text loss, {run.name}", detail))
    return cards


def headline(runs: Sequence[Run], evaluation: Evaluation, heights: PrintHeights) -> str:
    how = (
        "Differences are in points of a hundred; an interval that includes 0 shows nothing. “Uses the picture” is what "
        "is left of the score after taking away the best that can be had without looking."
    )
    cards = _picture_cards(evaluation) + _resolution_cards(evaluation, heights)
    cards += [card for run in runs for card in _loss_cards(run)]
    none = missing("neither held-out losses nor controls were found")
    return section("headline", "What came out", how, f'<div class="cards">{"".join(cards)}</div>' if cards else none)


def gaps_section(gaps: Sequence[str]) -> str:
    if not gaps:
        return ""
    items = "".join(f"<li>{text(gap)}</li>" for gap in gaps)
    return f'<section id="gaps"><h2>What is missing</h2><ul class="gaps">{items}</ul></section>'


# ----------------------------------------------------------------------------------------------------------- losses


def loss_panel(run: Run, key: str, title: str, unit: str) -> str:
    train, held_out = run.curve(key), run.curve(f"val_{key}")
    if not train and not held_out:
        return ""
    lines = []
    if train:
        lines.append(Series("training, each log line", thin(train), 0, faint=True))
        lines.append(Series("training, smoothed", thin(smooth(train)), 0))
    if held_out:
        lines.append(Series("held-out", held_out, 1, markers=len(held_out) <= 40))
    if key == "pixel_loss":
        baseline = run.curve("val_mean_color_loss") or run.curve("mean_color_loss")
        if baseline:
            lines.append(Series("mean colour of the patch", thin(baseline), 5, dashed=True))
    values = [y for line in lines for _, y in line.points]
    steps = [x for line in lines for x, _ in line.points]
    kind, last = ("held-out", held_out[-1][1]) if held_out else ("smoothed", smooth(train)[-1][1])
    over = f"over steps {min(steps):g} to {max(steps):g}"
    description = f"{title} of {run.name} {over}, from {values[0]:.3f}; last {kind} {last:.3f}"
    x = axis("step", steps, log=False, low=0, high=max(steps))
    return figure(run.name, title, line_chart(lines, x, axis(unit, values), description), lines)


def losses_section(runs: Sequence[Run]) -> str:
    how = (
        "Lower is better; the axis is logarithmic where a curve spans more than a factor of four, and held-out points "
        "come from pictures no step has seen. The dashed line is the pixel loss of painting each patch in its own mean "
        "colour: only what lies below it is structure that was predicted."
    )
    figures, gaps = [], []
    for run in runs:
        if run.curve("pixel_loss") or run.curve("text_loss"):
            panels = [
                loss_panel(run, "pixel_loss", "pixel loss", "loss per pixel value"),
                loss_panel(run, "text_loss", "text loss", "nats per token"),
            ]
        else:
            panels = [loss_panel(run, "loss", "loss", "nats per answer token")]
        figures += panels
        if not any(panels):
            gaps.append(missing(f"the curves of {run.name}, {run.path / 'metrics.jsonl'} has no losses"))
    body = f'<div class="figures">{"".join(figures)}</div>' if any(figures) else ""
    return section("losses", "Loss curves", how, body + "".join(gaps) or missing("no runs were given"))


# ----------------------------------------------------------------------------------------------------------- scores


def _is_interval(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(finite(v) for v in value)


def _strip(row: Mapping[str, Any], controls: Mapping[str, float], style: int, top: float) -> str:
    """From 0 to `top`: a grey bar up to the best control, the score with its interval."""

    def place(value: float) -> float:
        return 6 + 148 * min(1.0, max(0.0, value / top))

    parts = ['<svg class="strip" viewBox="0 0 160 20" aria-hidden="true"><path class="axis" d="M6,10H154"/>']
    if controls:
        parts.append(f'<path class="controls" d="M6,10H{place(max(controls.values())):.1f}"/>')
    if _is_interval(row.get("interval")):
        low, high = map(place, row["interval"])
        parts.append(f'<path class="bar s{style % NUM_STYLES}" d="M{low:.1f},10H{high:.1f}"/>')
    return "".join(parts) + marker(style, place(row["score"]), 10) + "</svg>"


def _or(value: Any, otherwise: str) -> Any:
    return otherwise if value is None else value


def further_table(evaluation: Evaluation) -> str:
    """What probes and zero-shot rows say beside their score; nothing without such rows."""
    body = "".join(
        f"<tr><th scope=row>{quoted(benchmark)}</th><td>{quoted(arm.label)}</td><td>{text('; '.join(words))}</td></tr>"
        for (arm, benchmark, control), row in evaluation.cells.items() if control is None and (words := further_scores(row))
    )
    if not body:
        return ""
    note = ('<p class="note">The score above is that of the probe which a tenth of train chose. Best on test: the paper’s way, the best of the grid '
            "as test itself tells, and so too high.</p>")
    return "<h3>Further scores</h3>" + note + scrolled("further scores", table("plain", ("data set", "model", "scores"), body))


def _about_benchmark(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    about = [str(first.get("metric", "metric unknown"))]
    about.append(f"split {first['split']}" if first.get("split") else "split unknown")
    if finite(first.get("num_questions")) and finite(first.get("num_pictures")):
        about.append(f"{plural(first['num_questions'], 'question')} on {plural(first['num_pictures'], 'picture')}")
    about.append(plural(sum(row.get("num_errors") or 0 for row in rows), "error"))
    return ", ".join(about)


def _result_row(evaluation: Evaluation, arm: Arm, benchmark: str, top: float) -> str:
    row = evaluation.cells[arm, benchmark, None]
    controls = control_scores(evaluation, arm, benchmark)
    gain = uses_picture(evaluation, arm, [benchmark])
    used = "–"
    if gain is not None:
        low, high = gain.interval or (-math.inf, math.inf)
        look = "good" if low > 0 else "bad" if high < 0 else "unsure"
        used = f'<span class="{look}">{points(gain.value, True)}</span>'
    cells = (
        ("score", f"<b>{points(row['score'])}</b>"),
        (INTERVAL, _interval_or_dash(row)),
        ("blind", points(controls["blind"]) if "blind" in controls else "–"),
        ("wrong picture", points(controls["wrong_picture"]) if "wrong_picture" in controls else "–"),
        ("most frequent", points(controls["majority"]) if "majority" in controls else "–"),
        ("uses the picture", used),
        ("tokens a picture", text(_or(row.get("tokens_per_picture"), "–"))),
    )
    other_grid = " <i>(not the grid it was tuned with)</i>" if row.get("tiling_override") else ""
    strip = _strip(row, controls, evaluation.style(arm), top)
    numbers = "".join(f'<td data-label="{name}">{value}</td>' for name, value in cells)
    return f'<tr><th scope=row>{arm_name(evaluation, arm)}{other_grid}</th><td class="wide">{strip}</td>{numbers}</tr>'


def results_table(evaluation: Evaluation) -> str:
    columns = (
        "<th scope=col>model</th><th scope=col class=wide>at a glance</th><th scope=col>score</th>"
        f"<th scope=col>{INTERVAL}</th><th scope=col>blind</th><th scope=col>wrong picture</th>"
        "<th scope=col>most frequent</th><th scope=col>uses the picture</th><th scope=col>tokens a picture</th>"
    )
    bodies = []
    for benchmark in evaluation.benchmarks:
        arms = [arm for arm in evaluation.arms if (arm, benchmark, None) in evaluation.cells]
        rows = [evaluation.cells[arm, benchmark, None] for arm in arms]
        top = max(100.0, *(row["score"] for row in rows))  # CIDEr may pass 100
        name = f"{quoted(benchmark)} <span>{text(_about_benchmark(rows))}</span>"
        body = "".join(_result_row(evaluation, arm, benchmark, top) for arm in arms)
        bodies.append(f'<tbody><tr class="group"><th scope=rowgroup colspan=9>{name}</th></tr>{body}</tbody>')
    return f'<table class="results"><thead><tr>{columns}</tr></thead>{"".join(bodies)}</table>'


def attributes_table(evaluation: Evaluation) -> str:
    """Accuracy by what was asked; captions and questions without a named attribute are left out."""
    found: dict[str, dict[Arm, list[float]]] = defaultdict(lambda: defaultdict(list))
    for arm in evaluation.arms:
        for benchmark in evaluation.benchmarks:
            if evaluation.cells.get((arm, benchmark, None), {}).get("metric") == "cider":
                continue
            for sample in evaluation.samples(arm, benchmark):
                if sample.get("attribute"):
                    found[str(sample["attribute"])][arm].append(sample["points"])
                if isinstance(sample.get("seen_in_train"), bool):
                    seen = "seen" if sample["seen_in_train"] else "never seen"
                    name = f"{sample.get('attribute') or 'all'}, answer {seen} in tuning"
                    found[name][arm].append(sample["points"])
    if not found:
        return ""
    body = []
    for attribute, scores in sorted(found.items()):
        cells = []
        for arm in evaluation.arms:
            mean = sum(scores[arm]) / len(scores[arm]) if scores.get(arm) else None
            cells.append("<td>–</td>" if mean is None else f'<td style="--share:{mean:.0f}%">{points(mean)}</td>')
        count = max(map(len, scores.values()))
        body.append(f'<tr><th scope=row>{quoted(attribute)}</th>{"".join(cells)}<td class="num">{count:,}</td></tr>')
    columns = ["asked about", *(quoted(arm.label) for arm in evaluation.arms), "questions"]
    return "<h3>By what was asked</h3>" + scrolled("accuracy by what was asked", table("heat", columns, "".join(body)))


def _interval_or_dash(row: Mapping[str, Any], sign: bool = False) -> str:
    return span(*row["interval"], sign) if _is_interval(row.get("interval")) else "–"


def comparisons_tables(evaluation: Evaluation) -> str:
    """What `comparisons.json` holds: the models' differences and the questions that need the picture; nothing without it."""
    found = {} if evaluation.path is None else read_json(evaluation.path / "comparisons.json")
    paired = [row for row in found.get("paired") or [] if isinstance(row, dict) and finite(row.get("difference"))]
    need = [row for row in found.get("needs_picture") or [] if isinstance(row, dict) and finite(row.get("score"))]
    body = ""
    if paired:
        rows = "".join(
            f"<tr><th scope=row>{quoted(row.get('benchmark'))}</th><td>{quoted(row.get('first'))} − {quoted(row.get('second'))}</td>"
            f"<td>{points(row['difference'], True)}</td><td>{_interval_or_dash(row, True)}</td><td>{'yes' if row.get('told_apart') else 'no'}</td></tr>"
            for row in paired
        )
        note = "Over the questions that both answered; pictures are the clusters. Told apart: the interval excludes 0."
        body += folded_table("Models against each other", note, ("benchmark", "models", "difference", INTERVAL, "told apart"), rows)
    if need:
        rows = "".join(
            f"<tr><th scope=row>{quoted(row.get('benchmark'))}</th><td>{quoted(row.get('model'))}</td><td>{points(row['score'])}</td><td>{_interval_or_dash(row)}</td>"
            f"<td>{row.get('num_questions'):,} of {row.get('num_asked'):,}</td></tr>"
            for row in need
        )
        note = "Questions that no model answers right blind and that the most frequent training answer misses."
        body += folded_table("Questions that need the picture", note, ("benchmark", "model", "score", INTERVAL, "questions"), rows)
    return body


def results_section(evaluation: Evaluation) -> str:
    how = (
        "Blind = the same questions without a picture, wrong picture = with another row's whose answer differs, "
        "most frequent = the commonest training answer to that question. At a glance: the grey bar ends at the best of "
        f"these three, the mark is the score with its {INTERVAL} (pictures drawn with replacement), and only the "
        "distance between the two was learned from the picture."
    )
    if evaluation.arms:
        body = results_table(evaluation) + further_table(evaluation) + attributes_table(evaluation) + comparisons_tables(evaluation)
    else:
        body = missing(evaluation.gaps[0] if evaluation.gaps else "the ledger has no finished cell")
    return section("results", "Scores with controls", how, body)


# --------------------------------------------------------------------------------------------------- beside the paper


def paper_table(beside: Beside) -> str:
    theirs = "".join(
        f"<tr><td>{text(name)}, the paper</td>{''.join('<td>–</td>' if v is None else f'<td>{v:g}</td>' for v in values)}</tr>"
        for name, values in beside.paper.items()
    )
    ours = "".join(
        f"<tr><th scope=row>{quoted(model)}, ours</th>{''.join(f'<td>{text(cell_words(cell)) or chr(8211)}</td>' for cell in cells)}</tr>"
        for model, cells in beside.ours.items()
    )
    title = f"{beside.table.name}: {beside.table.title}"
    note = f'<p class="note">The paper\u2019s: {text(beside.table.note)}.</p>' if beside.table.note else ""
    return f"<h3>{text(title)}</h3>" + scrolled(title, table("plain", ["", *map(text, beside.columns)], theirs + ours)) + note


def paper_section(found: Sequence[Beside]) -> str:
    """Nothing where no score of ours belongs into a column of the paper."""
    if not found:
        return ""
    how = (
        f"Ours with the {INTERVAL} and, where the model bears the name of a paper\u2019s row, the difference to it. Only scores of the same split and prompt stand "
        "in a column; the paper gives no intervals, and differences below some points are within seeds."
    )
    return section("paper", "Beside the paper", how, "".join(map(paper_table, found)))


# --------------------------------------------------------------------------------------------------------- resolution

_RESOLUTION = re.compile(r"[\s,_]*(?<![A-Za-z0-9])(\d+\s*x\s*\d+|\d+\s*px)(?![A-Za-z0-9])")  # in a model's name


def resolution_section(evaluation: Evaluation) -> str:
    """Score against tokens a picture, a chart a benchmark, a line through models that differ in their resolution; nothing where none do."""
    figures = []
    for benchmark in evaluation.benchmarks:
        families: dict[tuple[str, bool], list[tuple[float, float, tuple[float, float], Arm]]] = defaultdict(list)
        for arm in evaluation.arms:
            row = evaluation.cells.get((arm, benchmark, None))
            if row is None or not finite(row.get("tokens_per_picture")) or not row.get("interval"):
                continue
            name = _RESOLUTION.sub("", arm.model).replace("upsampled", "").strip(" ,_") or "tiles"
            families[name, arm.source_size is not None].append((row["tokens_per_picture"], row["score"], tuple(row["interval"]), arm))
        if not any(len({tokens for tokens, *_ in found}) > 1 for found in families.values()):
            continue
        lines = []
        for number, ((name, upsampled), found) in enumerate(families.items()):
            found.sort(key=lambda one: one[0])
            lines.append(Series(
                name + (", upsampled" if upsampled else ""), [(tokens, score) for tokens, score, *_ in found], number, dashed=upsampled, markers=True,
                bars=[(tokens, *interval) for tokens, _, interval, _ in found],
                notes=[f"{arm.label}: {points(score)} ({span(*interval)}) at {tokens:,} tokens" for tokens, score, interval, arm in found],
            ))  # fmt: skip
        row = next(row for (_, b, _), row in evaluation.cells.items() if b == benchmark)
        x = axis("tokens a picture", [tokens for line in lines for tokens, _ in line.points])
        y = axis(f"{row.get('metric')}, points", [end for line in lines for _, *ends in line.bars for end in ends], log=False)
        ends = "; ".join(f"{line.name} from {line.points[0][1]:.0f} to {line.points[-1][1]:.0f}" for line in lines)
        figures.append(figure("Resolution", benchmark, line_chart(lines, x, y, f"Score on {benchmark} against tokens a picture: {ends}"), lines))
    if not figures:
        return ""
    how = (
        f"Models whose names differ in a resolution (2x2, 672 px) share a line; whiskers are {INTERVAL}s. Dashed: tiles cut from reduced pictures, the same tokens "
        "without the new pixels."
    )
    return section("resolution", "Score against resolution", how, f'<div class="figures">{"".join(figures)}</div>')


# ----------------------------------------------------------------------------------------------------- print height


def _print_curves(evaluation: Evaluation, heights: PrintHeights, in_encoder: bool) -> list[tuple[Arm, list[Bin]]]:
    curves = []
    for arm in evaluation.arms:
        found = []
        for benchmark, sample in evaluation.print_samples(arm):
            height = heights.encoder(arm, benchmark, sample) if in_encoder else sample["print_height"]
            if height is not None:
                found.append((height, sample["points"], f"{benchmark} {sample.get('picture_id')}"))
        bins = height_bins(found)
        if bins:
            curves.append((arm, bins))
    return curves


def _print_series(evaluation: Evaluation, arm: Arm, bins: Sequence[Bin]) -> Series:
    notes = [
        f"{arm.label}: {points(b.score)} ({span(*b.interval)}) at {b.height:.1f} px, {plural(b.num, 'question')}"
        for b in bins
    ]
    return Series(
        arm.label,
        [(b.height, b.score) for b in bins],
        evaluation.style(arm),
        dashed=arm.source_size is not None,
        markers=True,
        bars=[(b.height, *b.interval) for b in bins],
        notes=notes,
    )


def _print_numbers(title: str, curves: Sequence[tuple[Arm, Sequence[Bin]]]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{quoted(arm.label)}</th><td>{b.height:.1f}</td><td>{points(b.score)}</td>"
        f"<td>{span(*b.interval)}</td><td>{b.num}</td></tr>"
        for arm, bins in curves
        for b in bins
    )
    columns = ("model", "mean height, px", "accuracy", INTERVAL, "questions")
    return f"<h4>{title}</h4>" + scrolled(f"print height {title}", table("plain", columns, rows))


def print_section(evaluation: Evaluation, heights: PrintHeights) -> str:
    how = (
        "Each point gathers questions about print of similar height (steps of a factor 1.41), with a "
        f"{INTERVAL} over pictures. If tiles help by resolution alone, then the curves of the second chart lie on each "
        "other and large print does not change."
    )
    figures, numbers = [], []
    for title, in_encoder, label in (
        ("in source pixels", False, "cap height in the source picture, pixels"),
        ("in encoder pixels", True, "cap height as the encoder sees it, pixels"),
    ):
        curves = _print_curves(evaluation, heights, in_encoder)
        if not curves:
            continue
        lines = [_print_series(evaluation, arm, bins) for arm, bins in curves]
        ends = "; ".join(f"{s.name} from {s.points[0][1]:.0f} to {s.points[-1][1]:.0f}" for s in lines)
        x = axis(label, [height for line in lines for height, _ in line.points], log=True)
        y = axis("accuracy, points", [], log=False, low=0, high=100)
        chart = line_chart(lines, x, y, f"Accuracy against {label}: {ends}")
        figures.append(figure("Print height", title, chart, lines))
        numbers.append(_print_numbers(title, curves))
    if not figures:
        has_print = any(evaluation.print_samples(arm) for arm in evaluation.arms)
        few = f"no step of print heights has {MIN_BIN} questions"
        none = "no question comes with a print height" if evaluation.arms else "there is no evaluation"
        return section("print", "Accuracy against print height", how, missing(few if has_print else none))
    if len(figures) == 1:
        needs = "they need the checkpoint's config.json and the benchmark's parquet"
        figures.append(missing(f"heights in encoder pixels, {needs}"))
    body = f'<div class="figures">{"".join(figures)}</div>'
    if any(arm.source_size is not None for arm in evaluation.arms):
        note = "An upsampled arm is drawn at the pixels it was reduced to: that is all its tiles can know."
        body += f'<p class="note">{note}</p>'
    body += f"<details><summary>The numbers behind the charts</summary>{''.join(numbers)}</details>"
    return section("print", "Accuracy against print height", how, body)


# ---------------------------------------------------------------------------------------------------------- samples


def picture_with_tiles(picture: Picture, grid: tuple[int, int], alt: str) -> str:
    """The picture inside its padded square, with the borders of the tiles over it."""
    side, (rows, columns) = max(picture.height, picture.width), grid
    lines = "".join(f"M{side * i / columns:.1f},0V{side}" for i in range(1, columns))
    lines += "".join(f"M0,{side * i / rows:.1f}H{side}" for i in range(1, rows))
    frame = f"M0,0H{side}V{side}H0Z"
    overlay = f'<path class="halo" d="{frame}{lines}"/><path class="tile" d="{lines or frame}"/>'
    if picture.height != picture.width:
        top, left = (side - picture.height) / 2, (side - picture.width) / 2
        inside = f"M{left:.1f},{top:.1f}h{picture.width}v{picture.height}h-{picture.width}Z"
        overlay = f'<path class="pad" d="{inside}"/>' + overlay
    size = f'width="{picture.width}" height="{picture.height}"'
    return (
        f'<div class="picture"><img src="{picture.data_uri}" alt="{text(alt)}" {size}>'
        f'<svg viewBox="0 0 {side} {side}" aria-hidden="true">{overlay}</svg></div>'
    )


def _answer_line(evaluation: Evaluation, arm: Arm, benchmark: str, sample: Mapping[str, Any]) -> str:
    name = f"<span>{arm_name(evaluation, arm)}</span>"
    if "points" not in sample:
        reason = quoted(sample.get("error") or "reason unknown")
        return f'<li class="wrong">{name}<b>no answer: {reason}</b></li>'
    prediction = str(sample.get("prediction") or "").strip()
    shown = f"<b>{quoted(prediction)}</b>" if prediction else "<i>empty answer</i>"
    score = sample["points"]
    if evaluation.cells[arm, benchmark, None].get("metric") == "cider":
        return f'<li class="caption">{name}{shown} <em>CIDEr {score:.0f}</em></li>'
    look = "right" if score >= 50 else "wrong"
    partly = f", {score:.0f} of 100" if 0 < score < 100 else ""
    return f'<li class="{look}">{name}{shown} <em>{look}{partly}</em></li>'


def sample_card(
    evaluation: Evaluation, heights: PrintHeights, benchmark: str, key: str, picture: Picture | None
) -> str:
    answered = {}
    for arm in evaluation.arms:
        sample = next((s for s in evaluation.answers(arm, benchmark) if str(s.get("id")) == key), None)
        if sample is not None:
            answered[arm] = sample
    arm, first = next(iter(answered.items()))
    grid = max((a.grid for a in answered), key=math.prod)
    alt = f"Picture {first.get('picture_id')} of {benchmark}, divided into {grid[0]} by {grid[1]} tiles"
    unread = missing("the picture could not be read from the benchmark's parquet")
    shown = picture_with_tiles(picture, grid, alt) if picture else unread
    answers = [str(answer) for answer in first.get("answers") or []]
    truth = ", ".join(quoted(answer) for answer in answers[:3]) or "–"
    if len(answers) > 3:
        truth += f" and {len(answers) - 3} more"
    about = [benchmark, str(first.get("attribute") or "")]
    if finite(first.get("print_height")):
        view = heights.one_view(arm, benchmark, first)
        about.append(f"print {first['print_height']:g} px high" + (f" ({view:.1f} in one view)" if view else ""))
    lines = "".join(_answer_line(evaluation, a, benchmark, sample) for a, sample in answered.items())
    return (
        f'<article class="sample">{shown}<p class="about">{text(" · ".join(a for a in about if a))}</p>'
        f'<h4>{quoted(first.get("question", ""))}</h4><p class="truth">truth <b>{truth}</b></p>'
        f"<ul>{lines}</ul></article>"
    )


def samples_section(
    evaluation: Evaluation,
    heights: PrintHeights,
    chosen: tuple[list[tuple[str, str]], list[tuple[str, str]]],
    pictures: Mapping[tuple[str, str], Picture],
) -> str:
    how = (
        "Pictures stand in their padded square, lines are the borders of the tiles (one view sees the whole square at "
        "the size of a single tile). The first group was drawn by a hash of the question's name, not by how it came "
        "out; the second only shows where models differ."
    )
    body = ""
    for title, keys in (("Drawn blindly", chosen[0]), ("Where the models differ", chosen[1])):
        if keys:
            cards = (sample_card(evaluation, heights, b, key, pictures.get((b, key))) for b, key in keys)
            body += f'<h3>{title}</h3><div class="samples">{"".join(cards)}</div>'
    none = missing("there are no answers to show")
    return section("samples", "Pictures, questions, answers", how, body or none)


# ------------------------------------------------------------------------------------------------------------ facts


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _versions(versions: Any) -> list[tuple[str, str]]:
    if not isinstance(versions, dict):
        return []
    return [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]


def run_facts(run: Run) -> str:
    if not run.path.is_dir():
        return f"<h3>{text(run.name)}</h3>{missing(run.gaps[0])}"
    rows: list[tuple[str, Any]] = [("directory", run.path)]
    if run.recipe:
        digest = hashlib.sha256(run.recipe.encode("utf-8", "replace")).hexdigest()
        rows.append(("recipe digest (SHA-256)", digest[:16]))
    for key in ("seed", "world", "git_commit", "processor", "machine", "cores"):
        if run.environment.get(key) is not None:
            rows.append((key.replace("_", " "), run.environment[key]))
    for key in ("step", "samples", "tokens", "bad_samples"):
        value = run.last(key)
        if value is not None:
            rows.append(("steps" if key == "step" else key.replace("_", " "), f"{value:,.0f}"))
    if run.train_seconds is not None:
        rows.append(("time in the loop", duration(run.train_seconds)))
    rates = sorted(rate for _, rate in run.curve("samples_per_s"))
    if rates:
        rows.append(("samples per second, median", f"{rates[len(rates) // 2]:,.1f}"))
    waits = [wait for _, wait in run.curve("data_wait")]
    if waits:
        rows.append(("waiting for data", f"{100 * sum(waits) / len(waits):.1f} % of the time"))
    for key, value in run.data_report.items():
        if isinstance(value, (str, int, float)) and value != "":
            rows.append((f"data: {key.replace('_', ' ')}", value))
    checkpoints = sorted((run.path / "checkpoints").glob("step_*"))
    if checkpoints:
        rows.append(("checkpoints", ", ".join(path.name for path in checkpoints)))
    if (run.path / "final").is_dir():
        rows.append(("final/", f"{_size(run.path / 'final') / 1e6:,.1f} MB"))
    rows += _versions(run.environment.get("versions"))
    body = facts_table(rows)
    if run.recipe:
        body += f"<details><summary>recipe.yaml as it ran</summary><pre>{text(run.recipe)}</pre></details>"
    return f"<h3>{text(run.name)}</h3>{body}"


def evaluation_facts(evaluation: Evaluation) -> str:
    if not evaluation.cells:
        return ""
    cells = list(evaluation.cells.values())
    rows: list[tuple[str, Any]] = [("directory", evaluation.path), ("cells of the ledger", len(cells))]
    seconds = [row["seconds"] for row in cells if finite(row.get("seconds"))]
    if seconds:
        rows.append(("time", duration(sum(seconds))))
    rows.append(("errors", sum(row.get("num_errors") or 0 for row in cells)))
    for arm in evaluation.arms:
        rows.append((arm.label, evaluation.any_cell(arm).get("model_path", "path unknown")))
    for benchmark in evaluation.benchmarks:
        row = next(row for (_, b, _), row in evaluation.cells.items() if b == benchmark)
        asked = f"first prompt “{row.get('prompt', 'unknown')}”, " if row.get("kind", "benchmarks") == "benchmarks" else ""
        rows.append((benchmark, f"{asked}data {str(row.get('data_hash', 'unknown'))[:16]}"))
    rows += _versions(cells[-1].get("versions"))
    return f"<h3>evaluation</h3>{facts_table(rows)}"


def facts_section(runs: Sequence[Run], evaluation: Evaluation, extra: Mapping[str, Any]) -> str:
    how = (
        "Everything needed to run it again: recipes as they were resolved, versions, seeds, machines. "
        "Two runs with the same recipe digest, data and seed compute the same numbers on the same machine."
    )
    body = facts_table(extra.items()) if extra else ""
    body += "".join(run_facts(run) for run in runs) + evaluation_facts(evaluation)
    return section("facts", "Run facts", how, body or missing("no runs and no evaluation were given"))


# --------------------------------------------------------------------------------------------------------- the page

SECTIONS = {"headline": "What came out", "losses": "Losses", "results": "Scores", "paper": "Paper", "resolution": "Resolution", "print": "Print height",
            "samples": "Pictures", "facts": "Facts"}


def navigation(body: str) -> str:
    """Links to the sections that `body` has."""
    links = " ".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in SECTIONS.items() if f'<section id="{anchor}">' in body)
    return f'<nav aria-label="sections">{links}</nav>'


def _read_all_pictures(
    evaluation: Evaluation, keys: Sequence[tuple[str, str]]
) -> tuple[dict[tuple[str, str], Picture], dict[tuple[str, str], int]]:
    """Pictures of the questions `keys`, and the longer side of every picture with print, by (benchmark, id)."""
    pictures: dict[tuple[str, str], Picture] = {}
    sides: dict[tuple[str, str], int] = {}
    for benchmark in evaluation.benchmarks:
        row = next(row for (_, b, _), row in evaluation.cells.items() if b == benchmark)
        shown = {key for b, key in keys if b == benchmark}
        printed = (pair for arm in evaluation.arms for pair in evaluation.print_samples(arm))
        sized = {str(sample.get("picture_id")) for b, sample in printed if b == benchmark}
        if not shown and not sized:
            continue
        folder, split = Path(str(row.get("data", ""))), str(row.get("split") or "test")
        found, lengths = read_pictures(folder, split, shown, sized)
        pictures |= {(benchmark, key): picture for key, picture in found.items()}
        sides |= {(benchmark, key): side for key, side in lengths.items()}
        if len(found) < len(shown):
            lost = f"{len(shown) - len(found)} of {len(shown)} pictures could not be read from {folder}"
            evaluation.gaps.append(f"evaluation: {benchmark}: {lost}")
    return pictures, sides


def write_report(
    out_html: str | Path,
    *,
    runs: Mapping[str, str | Path],
    eval_dir: str | Path | None,
    title: str,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of training `runs` (name -> run directory) and one evaluation directory to `out_html`.

    `extra` adds lines to the run facts (label -> value). Missing directories, files and damaged lines are named in the
    report and stop nothing. The file appears only when it is whole; OSError when it cannot be written.
    """
    read = [Run.read(name, Path(path)) for name, path in runs.items()]
    evaluation = Evaluation(None if eval_dir is None else Path(eval_dir))
    chosen = choose_samples(evaluation)
    pictures, sides = _read_all_pictures(evaluation, [*chosen[0], *chosen[1]])
    heights = PrintHeights(evaluation, sides)
    beside = beside_the_paper(evaluation.cells.values())
    first, *others = [
        headline(read, evaluation, heights),
        losses_section(read),
        results_section(evaluation),
        paper_section(beside),
        resolution_section(evaluation),
        print_section(evaluation, heights),
        samples_section(evaluation, heights, chosen, pictures),
        facts_section(read, evaluation, extra or {}),
    ]
    gaps = list(dict.fromkeys([gap for run in read for gap in run.gaps] + evaluation.gaps))
    counts = (
        plural(len(read), "run"),
        plural(len(evaluation.arms), "model"),
        plural(len(evaluation.benchmarks), "benchmark"),
    )
    body = "\n".join(filter(None, [first, gaps_section(gaps), *others]))
    header = f'<p class="sub">{", ".join(counts)}</p>\n{navigation(body)}'
    whole = page(title, STYLE.read_text(encoding="utf-8"), header, body)
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out.with_suffix(".md"), scores_in_markdown(title, evaluation, beside, gaps))
    write_atomically(out, whole)
    return out


def scores_in_markdown(title: str, evaluation: Evaluation, beside: Sequence[Beside], gaps: Sequence[str]) -> str:
    """`report.md`: scores with controls, the paper's tables, what is missing."""
    lines = [f"# {escape(title)}", ""]
    if evaluation.arms:
        lines += ["| model | benchmark | split | metric | score | 95 % interval | blind | wrong picture | most frequent | questions | tokens a picture |", "|---" * 11 + "|"]
        for arm in evaluation.arms:
            for benchmark in evaluation.benchmarks:
                if (row := evaluation.cells.get((arm, benchmark, None))) is None:
                    continue
                controls = control_scores(evaluation, arm, benchmark)
                low_high = "" if not row.get("interval") else "{:.1f} to {:.1f}".format(*row["interval"])
                shown = [arm.label, benchmark, row.get("split", ""), row.get("metric", ""), f"{row['score']:.1f}", low_high,
                         *("" if controls.get(name) is None else f"{controls[name]:.1f}" for name in ("blind", "wrong_picture", "majority")),
                         row.get("num_questions", ""), _or(row.get("tokens_per_picture"), "")]
                lines.append("| " + " | ".join(map(escape, shown)) + " |")
        lines.append("")
    further = [f"- {escape(arm.label)}, {escape(benchmark)}: {escape('; '.join(words))}" for (arm, benchmark, control), row in evaluation.cells.items()
               if control is None and (words := further_scores(row))]
    if further:
        lines += ["## Further scores", "", *further, ""]
    if beside:
        lines += ["## Beside the paper", "", markdown(beside)]
    if gaps:
        lines += ["## What is missing", "", *(f"- {escape(gap)}" for gap in gaps), ""]
    return "\n".join(lines)
