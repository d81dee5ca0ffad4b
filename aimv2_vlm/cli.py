"""The command line. Every import that costs time happens inside the verb that needs it, so `--help` is instant."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from aimv2_vlm.config import EXIT_STOPPED, UserError

EXIT_USER_ERROR = 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aimv2-vlm", description="From image-text shards to a chat assistant built on an AIMv2 encoder.",
        epilog="Recipes are YAML files; any key can be given on the command line, e.g. optim.lr=1e-4.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="the whole chain on embedded data, then report.html")
    demo.add_argument("--out", default="runs/demo", help="where everything goes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--split", choices=("test", "dev"), default="test", help="dev: for choosing settings (default: %(default)s)")

    doctor = verbs.add_parser("doctor", help="versions, devices, what will and will not work here")
    doctor.add_argument("--json", action="store_true", help="print it as JSON")

    data = verbs.add_parser("data", help="check, show, pack or caption data before a run")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="validate and count shards (.tar) or conversations (.json, .jsonl, documents also .parquet)")
    check.add_argument("paths", nargs="+", help="shards (globs and {00000..00010} allowed) or conversation files")
    add_sources(check)
    check.add_argument("--caption", action="append", metavar="COLUMN", help="caption column: txt (default) or json:FIELD; may be repeated")
    check.add_argument("--decode", action="store_true", help="decode every picture, find those that look alike (default: headers, equal bytes)")
    check.add_argument("--against", metavar="PATH", help="evaluation set (folder of pictures, parquet or tar): name the samples that look like it")
    check.add_argument("--near-bits", type=int, help="most bits of 64 in which two look-alikes differ, 0 to 7 (default: 6)")
    check.add_argument("--expect", metavar="DATASET", help="also check that an img2dataset download of cc12m, coyo, dfn or recap is complete")
    check.add_argument("--json", metavar="FILE", help="write the full report here")
    check.add_argument("--max-bad-fraction", type=float, default=0.01)
    check.add_argument("--page", metavar="FILE", help="also write an HTML page of sample rows: supervised, prompt and image tokens, tiles, counts")
    check.add_argument("--llm", metavar="PATH", help="tokenizer of the page (default: a small one trained on the rows, as a new decoder's is)")
    check.add_argument("--recipe", help="sft recipe that the page takes tokenizer, template, tiling and max_length from")
    check.add_argument("--template", help="llama3, vicuna, plain or own (default: the recipe's, or llama3)")
    check.add_argument("--grid", help="tiles of the page, e.g. 2x2 (default: the recipe's, or 1x1)")
    check.add_argument("--num", type=int, default=24, help="rows on the page (default: %(default)s)")
    check.add_argument("--seed", type=int, default=0, help="another seed draws other rows for the page (default: %(default)s)")
    preview = actions.add_parser("preview", help="one HTML page with pictures and captions (or conversations) of some samples")
    preview.add_argument("paths", nargs="+", help="shards or conversation files, as for check")
    preview.add_argument("--out", default="preview.html", help="the page (default: %(default)s)")
    add_sources(preview)
    preview.add_argument("--num", type=int, default=64, help="samples shown (default: %(default)s)")
    preview.add_argument("--seed", type=int, default=0, help="another seed draws other samples (default: %(default)s)")
    pack = actions.add_parser("pack", help="a folder of pictures + captions -> image-text shards")
    pack.add_argument("folder", help="folder the picture paths are relative to")
    pack.add_argument("out", help="folder for the shards")
    pack.add_argument("--captions", default=None, help="JSONL/CSV with image and caption(s); default: <picture>.txt beside it")
    pack.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="keep only rows with this value")
    pack.add_argument("--samples-per-shard", type=int, default=1000)
    pack.add_argument("--max-bad-fraction", type=float, default=0.01)

    annotations = actions.add_parser("annotations", help="COCO, LVIS or RefCOCO annotations -> JSON lines of one kind; those with captions for data pack and retrieval")
    annotations.add_argument("path", help="the annotation file")
    annotations.add_argument("out", help="the rows, one JSON object a picture")
    annotations.add_argument("--form", required=True, help="coco_captions, coco_instances, lvis or refcoco")
    annotations.add_argument("--images", required=True, metavar="FOLDER", help="folder of the pictures")
    annotations.add_argument("--instances", metavar="FILE", help="refcoco: file of the boxes (default: instances.json beside it)")
    annotations.add_argument("--split", help="refcoco: keep train, val, testA, testB or test")
    annotations.add_argument("--json", metavar="FILE", help="write the full report here")
    annotations.add_argument("--max-bad-fraction", type=float, default=0.01)

    recaption = actions.add_parser("recaption", help="shards with synthetic captions of any image-text-to-text model, as a field of their .json")
    recaption.add_argument("shards", help="shards (globs and {00000..00010} allowed)")
    recaption.add_argument("out", help="folder for the new shards; a second call goes on where the first was stopped")
    recaption.add_argument("--model", required=True, help="folder or hub name of a model for pictures and text, e.g. runs/demo/sft_2x2/final")
    recaption.add_argument("--prompt", default="Describe the picture.", help="what the model is asked (default: %(default)s)")
    recaption.add_argument("--field", default="synthetic_caption", help="key of the caption in each .json (default: %(default)s)")
    recaption.add_argument("--batch-size", type=int, default=16)
    recaption.add_argument("--max-new-tokens", type=int, default=64)
    recaption.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    recaption.add_argument("--max-bad-fraction", type=float, default=0.01)

    for verb, text, argument in (("pretrain", "pre-train or continue an encoder", "RECIPE"),
                                 ("sft", "tune an assistant on conversations", "RECIPE"),
                                 ("eval", "run benchmarks and write the report", "CONFIG")):
        sub = verbs.add_parser(verb, help=text)
        sub.add_argument("recipe", metavar=argument, help="a YAML file, or the name of one that ships with the package")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="keys that differ from the file")
        sub.add_argument("--restart", action="store_true", help="delete what this run directory holds and begin anew")
        if verb == "eval":
            sub.add_argument("--plan", action="store_true",
                             help="run nothing; list the data sets: where from, rows, size, licence, what is missing (then exit status 1)")
            sub.add_argument("--processes", type=int, default=None, metavar="N",
                             help="share a sweep's work between N processes, on GPUs one a device (the key `processes`)")
        else:
            sub.add_argument("--processes", type=int, default=1, metavar="N",
                             help="share the work between N processes of this machine's CPU (elsewhere: torchrun or accelerate launch)")

    scaling = verbs.add_parser("scaling", help="size x samples study: which encoder size a compute budget wants")
    scaling.add_argument("recipe", metavar="CONFIG", help="a YAML file, or the name of one that ships with the package")
    scaling.add_argument("overrides", nargs="*", metavar="key=value", help="keys that differ from the file")
    scaling.add_argument("--collect", action="store_true", help="train nothing; report on the runs that are finished")
    scaling.add_argument("--budget", action="append", type=float, default=[], metavar="FLOPS",
                         help="print the size and the samples that this much training compute wants; trains nothing; may be repeated")
    scaling.add_argument("--restart", action="store_true", help="delete the study's runs and begin anew")
    scaling.add_argument("--processes", type=int, default=1, metavar="N", help="share each run between N processes of this machine's CPU")

    convert = verbs.add_parser("convert", help="a checkpoint into another layout, proved and with a receipt")
    convert.add_argument("source", metavar="SRC", help="folder, .safetensors file or hub name, in any AIMv2 layout or LLaVA's; final/ of a run")
    convert.add_argument("destination", metavar="DST", help="new folder")
    convert.add_argument("--to", default="transformers", metavar="LAYOUT",
                         help="transformers (default); Apple's names: apple_encoder, apple_two_tower, apple_trainer; of an assistant: llava")

    recipes = verbs.add_parser("recipes", help="list or copy the recipes that ship with the package")
    recipes.add_argument("action", choices=("list", "copy"))
    recipes.add_argument("folder", nargs="?", default=".", help="where `copy` puts them")

    chat = verbs.add_parser(
        "chat", help="talk with an assistant, in the terminal or in a page (--web)",
        description="Talks with whatever AutoModelForImageTextToText opens; Llava, LlavaNext and our Cohere2Vision encode a picture once, others with every question.",
    )
    chat.add_argument("model", help="an assistant's folder, e.g. runs/demo/sft_2x2/final, or a name on the hub")
    chat.add_argument("--image", default=None, help="picture for the conversation")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens (default: %(default)s)")
    chat.add_argument("--web", action="store_true", help="serve a page instead (needs the extra [web])")
    chat.add_argument("--port", type=int, default=None, help="port of the page (default: the first free one from 7860)")
    chat.add_argument("--host", default=None, help="address the page is served at (default: this machine only, 127.0.0.1)")
    return parser


def add_sources(parser: argparse.ArgumentParser) -> None:
    """How conversation files are read, as in a recipe's data.sources."""
    parser.add_argument("--images", default="", help="image folder of conversation files")
    parser.add_argument("--format", default="conversations", help="conversations (default), or documents: obelics, mmc4")
    parser.add_argument("--follow-links", action="store_true", help="accept pictures behind links that lead out of the image folder")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes `key=value` words behind an option (`--restart lr=1`) for unknown ones: here they are overrides."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def command() -> NoReturn:
    """The process `aimv2-vlm`: `main`, then the end.

    A process of a group leaves without finalising the interpreter. Gloo's threads may still hold tensors of collectives that
    are long through; one that lets go of them in a finalising interpreter aborts the process (pytorch issue 190489), and
    `destroy_process_group` does not end these threads while a wrapped model is alive.
    """
    try:
        code = main()
    except Exception:
        if not in_group():
            raise
        traceback.print_exc()
        code = 1
    if in_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def in_group() -> bool:
    """True in a process that has joined a process group; never imports torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's); returns the exit status."""
    arguments = parse(argv)
    # transformers imports an installed torchao, whose use of torch is announced as deprecated: nothing a user could mend
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        return run(arguments)
    except UserError as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(arguments: argparse.Namespace) -> int:
    if arguments.verb == "doctor":
        from aimv2_vlm.doctor import doctor

        return doctor(as_json=arguments.json)
    if arguments.verb == "recipes":
        from aimv2_vlm.recipe import copy_recipes, list_recipes

        return list_recipes() if arguments.action == "list" else copy_recipes(arguments.folder)
    if arguments.verb == "data":
        from aimv2_vlm.data import tools

        return getattr(tools, arguments.action)(arguments)
    if arguments.verb in ("pretrain", "sft", "eval"):
        return run_recipe(arguments)
    if arguments.verb == "scaling":
        return run_scaling(arguments)
    if arguments.verb == "convert":
        return convert_checkpoint(arguments)
    if arguments.verb == "demo":
        with leaving_on_sigterm():
            from aimv2_vlm.demo import demo

            return stoppable(lambda: demo(arguments.out, arguments.seed, arguments.split))
    if arguments.web:
        from aimv2_vlm.serve.web import serve

        return serve(arguments.model, arguments.image, arguments.max_new_tokens, arguments.host, arguments.port)
    if arguments.host is not None or arguments.port is not None:
        raise UserError("--host and --port: belong to the page; add --web")
    from aimv2_vlm.serve.chat import chat

    return chat(arguments.model, arguments.image, arguments.max_new_tokens)


def run_recipe(arguments: argparse.Namespace) -> int:
    from aimv2_vlm.recipe import load_recipe

    recipe = load_recipe(arguments.verb, arguments.recipe, arguments.overrides)  # refuses wrong keys before torch loads
    if arguments.verb == "eval":
        return evaluate(recipe, arguments)
    with leaving_on_sigterm():
        if arguments.processes > 1:
            from aimv2_vlm.train.launch import run_in_processes

            words = [arguments.verb, arguments.recipe, *arguments.overrides, *(["--restart"] if arguments.restart else [])]
            return stoppable(lambda: run_in_processes(words, arguments.processes))
        from aimv2_vlm.train import run as training

        entry = training.pretrain if arguments.verb == "pretrain" else training.sft
        return stoppable(lambda: entry(recipe, restart=arguments.restart))


def evaluate(config, arguments: argparse.Namespace) -> int:
    """Benchmarks, probes or zero-shot, as the config's `kind` says."""
    if arguments.plan:
        from aimv2_vlm.evaluation.plan import print_plan

        return print_plan(config)
    if config.kind == "benchmarks":
        from aimv2_vlm.evaluation.sweep import evaluate as run_benchmarks

        config.processes = arguments.processes or config.processes
        return run_benchmarks(config, restart=arguments.restart)
    with leaving_on_sigterm():
        if (arguments.processes or 1) > 1:
            if config.kind != "probing":
                raise UserError(f"--processes: an evaluation of kind {config.kind} runs in one process; leave it out")
            from aimv2_vlm.train.launch import run_in_processes

            words = ["eval", arguments.recipe, *arguments.overrides, *(["--restart"] if arguments.restart else [])]
            return stoppable(lambda: run_in_processes(words, arguments.processes))
        from aimv2_vlm.evaluation import probing, zeroshot

        entry = probing.evaluate if config.kind == "probing" else zeroshot.evaluate
        return stoppable(lambda: entry(config, restart=arguments.restart))


def run_scaling(arguments: argparse.Namespace) -> int:
    from aimv2_vlm.recipe import load_recipe

    config = load_recipe("scaling", arguments.recipe, arguments.overrides)
    collect = arguments.collect or bool(arguments.budget)
    with leaving_on_sigterm():
        if arguments.processes > 1 and not collect:
            from aimv2_vlm.train.launch import run_in_processes

            words = ["scaling", arguments.recipe, *arguments.overrides, *(["--restart"] if arguments.restart else [])]
            return stoppable(lambda: run_in_processes(words, arguments.processes))
        from aimv2_vlm.scaling import scaling

        return stoppable(lambda: scaling(config, collect=collect, budgets=arguments.budget, restart=arguments.restart))


def convert_checkpoint(arguments: argparse.Namespace) -> int:
    with leaving_on_sigterm():
        from aimv2_vlm.models.convert import convert, summary
        from aimv2_vlm.train.directory import storage_errors, sync_tree, versions

        with storage_errors(arguments.destination):
            receipt = convert(arguments.source, arguments.destination, arguments.to, versions=versions(), sync=sync_tree)
    print(summary(receipt, arguments.destination))
    return 0


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Outside the training loop, which saves first, SIGTERM leaves at once with the loop's exit code.

    What is being written then is under a temporary name. SystemExit, because libraries swallow lesser exceptions while they
    are imported.
    """
    def leave(number: int, frame: object) -> None:
        print("stopped by SIGTERM outside of a training step; the same command goes on from what is saved", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_STOPPED)

    old = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def stoppable(work) -> int:
    from aimv2_vlm.train.loop import Stopped

    try:
        result = work()
    except Stopped as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        return stop.exit_code
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
