"""The model card of a trained model (`final/README.md`): what it is, what it learned from, under which licences, and its scores.

Metadata are the hub's (`huggingface_hub.ModelCard`), so a card that is uploaded with its folder shows on a model page as others do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from aimv2_vlm import recipe as recipes
from aimv2_vlm.config import PretrainRecipe, SftRecipe, UserError
from aimv2_vlm.models.assistant import part_of
from aimv2_vlm.train.directory import git_commit, versions, write_atomically

FILE = "README.md"
BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"
NO_SCORES = "None recorded here yet: `aimv2-vlm eval … write_cards=true` writes them."
TWO_TOWERS = ("clip", "lit")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name; a local path of two parts is told apart by existing


def parameters_of(model: Any) -> dict[str, int]:
    """Numbers of parameters of what `final/` holds: an assistant's parts, an encoder, two towers together."""
    if (assistant := getattr(model, "assistant", None)) is not None:
        counts = dict.fromkeys(("encoder", "connector", "decoder"), 0)
        for name, parameter in assistant.named_parameters():
            part = part_of(name)
            counts["decoder" if part == "llm" else part] += parameter.numel()
        return counts
    encoder = getattr(model, "encoder", None)
    if encoder is None:
        return {"towers": sum(p.numel() for p in model.parameters())}
    return {"encoder": sum(p.numel() for p in encoder.parameters())}


def write_card(folder: Path, recipe: PretrainRecipe | SftRecipe, parameters: Mapping[str, int]) -> None:
    """Write `folder`/README.md of a run whose directory is the folder's parent. parameters: numbers of each part."""
    from huggingface_hub import ModelCard, ModelCardData

    report, log = folder.parent / "data_report.json", folder.parent / "metrics.jsonl"
    data: dict[str, Any] = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    final: dict[str, Any] = {}  # what was logged last of every number, on held-out data too
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        final |= json.loads(line)
    tuned = isinstance(recipe, SftRecipe)
    bases = [path for path in ((recipe.encoder.path, recipe.llm.path) if tuned else (recipe.encoder.path,)) if _on_hub(path)]
    task = "image-text-to-text" if tuned else "zero-shot-image-classification" if recipe.objective.name in TWO_TOWERS else "image-feature-extraction"
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag=task, base_model=bases or None,
        tags=["aimv2", *(["llava"] if tuned and recipe.tiling.unshuffle == 1 else [])], model_name=Path(recipe.out).name, license=recipe.licence or None)
    sections = [
        f"# {Path(recipe.out).name}", _assistant(recipe, parameters) if tuned else _encoder(recipe, parameters),
        "## Scores", f"{BEGIN}\n{NO_SCORES}\n{END}",
        "## Data", _sources(recipe, data), "## Training", _training(final), "The whole recipe:", f"```yaml\n{yaml.safe_dump(_without_folders(recipe), sort_keys=False, allow_unicode=True).strip()}\n```",
        "## Made with", ", ".join(f"{name} {version}" for name, version in versions().items()) + (f"; commit {commit}" if (commit := git_commit()) else "") + ".",
    ]
    write_atomically(folder / FILE, str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections))) + "\n")


def add_scores(folder: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Put the ledger's rows of one model into its card, in place of those that stood there; the table and the hub's `model-index`.

    Raises UserError where the folder has no card of this package.
    """
    from huggingface_hub import EvalResult, ModelCard

    path = Path(folder) / FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{path}: no model card that aimv2-vlm wrote, so scores cannot be added; leave write_cards out, or copy the table from report.md")
    rows = [row for row in rows if row["control"] is None]
    lines = ["| benchmark | split | metric | score | 95 % interval | questions | tokens a picture |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        note = "" if row["complete"] else f" (incomplete: {row['num_errors']} errors)"
        interval = "" if row["interval"] is None else "{:.1f} to {:.1f}".format(*row["interval"])
        lines.append(f"| {row['benchmark']} | {row['split']} | {row['metric']} | {_rounded(row['score'])}{note} | {interval} | {row['num_questions']:,} "
                     f"| {row['tokens_per_picture']} |")
    table = "\n".join(lines) if rows else NO_SCORES
    card = ModelCard(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL))
    card.data.eval_results = [
        EvalResult(task_type=card.data.pipeline_tag, dataset_type=row["benchmark"], dataset_name=row["benchmark"], dataset_split=row["split"],
                   metric_type=row["metric"], metric_value=row["score"])
        for row in rows if row["complete"]
    ] or None
    write_atomically(path, str(card) if str(card).endswith("\n") else f"{card}\n")
    return path


# -------------------------------------------------------------------------------------------------------------------- parts


def _assistant(recipe: SftRecipe, parameters: Mapping[str, int]) -> str:
    imports, put_on = "", ""
    if recipe.adapter.kind != "none" and not recipe.adapter.merge:  # without it the base answers, and nothing says so
        imports, put_on = "from peft import PeftModel\n", f'\nmodel = PeftModel.from_pretrained(model, "adapter")  # {recipe.adapter.kind} of rank {recipe.adapter.rank}'
    template = {"own": "the decoder's own chat template"}.get(recipe.llm.template, f"{recipe.llm.template}'s chat template")
    learned = ", ".join(recipe.trainable)
    unshuffle, connector = recipe.tiling.unshuffle, "a 2-layer MLP connector"
    views = "in one view" if recipe.tiling.grid == "1x1" else f"as an overview and {recipe.tiling.grid} tiles"
    if unshuffle > 1:
        connector = "a gated 2-layer connector"
        most = math.prod(map(int, recipe.tiling.grid.split("x")))
        views = "in one view" if most == 1 else f"as at most {most} tiles and an overview"
        views += f", {unshuffle**2} patches a token"
    views += ", padded to a square first" * recipe.tiling.pad_square
    return (
        f"An assistant that answers questions about pictures: {_part('encoder', recipe.encoder.path)}, {connector} and "
        f"{_part('decoder', recipe.llm.path)}, {_numbers(parameters)}. Learned in this run: {learned}. Pictures are seen {views}; {template}.\n\n"
        f"```python\n{imports}from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f'model, processor = AutoModelForImageTextToText.from_pretrained("."), AutoProcessor.from_pretrained("."){put_on}\n```'
    )


def _encoder(recipe: PretrainRecipe, parameters: Mapping[str, int]) -> str:
    if recipe.objective.name in TWO_TOWERS:
        return (
            f"An image tower and a text tower, {_numbers(parameters)}, patches of {recipe.encoder.patch_size} px, pictures of {recipe.image.size} px, trained by the "
            f"objective {recipe.objective.name} (arXiv 2411.14402, section 2.4).\n\n"
            '```python\nfrom transformers import AutoModel, AutoProcessor\n\nmodel, processor = AutoModel.from_pretrained("."), AutoProcessor.from_pretrained(".")\n'
            f"tokenizer, length = processor.tokenizer, {recipe.text.context_length}\n"
            "texts = tokenizer.pad(tokenizer(captions, truncation=True, max_length=length), padding=\"max_length\", max_length=length + 1, return_tensors=\"pt\")\n```\n"
            "Texts are cut to the context and padded to one place more, as above: the stock text tower is causal only where a row of the batch has padding."
        )
    native = " It takes pictures of any aspect, one at a time; the processor only scales their shorter side."
    name = {"aimv2": "by autoregressing patches and text", "aimv1": "by autoregressing patches"}.get(recipe.objective.name, f"by the objective {recipe.objective.name}")
    return (
        f"A vision encoder, {_numbers(parameters)}, patches of {recipe.encoder.patch_size} px, pictures of {recipe.image.size} px, pre-trained {name} "
        "(AIMv2, arXiv 2411.14402).\n\n"
        '```python\nfrom transformers import AutoImageProcessor, AutoModel\n\nencoder, processor = AutoModel.from_pretrained("."), '
        'AutoImageProcessor.from_pretrained(".")\n```\nThe features are `last_hidden_state`.' + native * (recipe.image.native.capacity is not None)
    )


def _sources(recipe: PretrainRecipe | SftRecipe, data: Mapping[str, Any]) -> str:
    counts = {source["path"]: source for source in data.get("sources", ())}
    lines = ["| source | licence | rows |", "|---|---|---|"]
    for source in recipe.data.sources:
        paths = [source.path] if isinstance(source.path, str) else list(source.path)
        found = counts.get(paths[0]) if len(paths) == 1 else None
        rows = "" if found is None else f"{found['taken']:,} of {found['rows']:,}"
        share = f", weight {source.weight:g}" if isinstance(recipe, PretrainRecipe) else f", {source.take}"
        lines.append(f"| {getattr(source, 'name', '') or ', '.join(Path(p).name for p in paths)}{share} | {source.licence or 'not stated'} | {rows} |")
    bad = data.get("bad_samples_in_training", 0) + data.get("bad_samples_in_index", 0)
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in (data.get("rejected") or {}).items())
    if isinstance(recipe, PretrainRecipe):
        lines.append(f"\n{data.get('samples', 0):,} pairs; {bad:,} could not be read.")
    else:
        lines.append(f"\nLeft out by reason: {rejected or 'none'}; unreadable while training: {bad:,}.")
    return "\n".join(lines)


def _training(final: Mapping[str, Any]) -> str:
    losses = ", ".join(f"{key.replace('val_', 'held-out ').replace('_', ' ')} {value:.4g}" for key, value in final.items() if key.endswith("loss") and value is not None)
    return f"{final.get('step', 0):,} steps, {final.get('samples', 0):,} samples; at the end {losses}."


def _part(what: str, path: str | None) -> str:
    if not path:
        return f"a {what} trained from scratch"
    return f"the {what} {path if _on_hub(path) else Path(path).parent.name if Path(path).name == 'final' else Path(path).name}"


def _on_hub(path: str | None) -> bool:
    return bool(path) and HUB_NAME.fullmatch(path) is not None and not Path(path).exists()


def _numbers(parameters: Mapping[str, int]) -> str:
    total = sum(parameters.values())
    return f"{total / 1e6:,.1f} M parameters" + (f" ({', '.join(f'{part} {count / 1e6:,.1f} M' for part, count in parameters.items())})" if len(parameters) > 1 else "")


def _without_folders(recipe: Any) -> Any:
    """The recipe with every absolute path cut to its last two parts: a card is published, a machine's folders are not."""
    def cut(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("/"):
            return "/".join(["…", *Path(value).parts[-2:]])
        if isinstance(value, Mapping):
            return {key: cut(one) for key, one in value.items()}
        return [cut(one) for one in value] if isinstance(value, list) else value

    return cut(recipes.parse_yaml(recipes.dump(recipe), "recipe"))


def _rounded(score: float | None) -> str:
    return "" if score is None else f"{score:.1f}"
