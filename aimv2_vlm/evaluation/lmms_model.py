"""The lmms-eval model `aimv2_vlm`: any assistant checkpoint, answered by `generation.Generator`.

    lmms_eval --model aimv2_vlm --model_args pretrained=runs/sft/final --include_path .../evaluation/tasks \
        --tasks scenes_print

Importing this module imports lmms-eval (7 s, 1 GB), which makes Pillow accept truncated pictures; that is undone here.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from PIL import Image, ImageFile

_tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import Task  # noqa: F401  (the module that sets the flag: import it before it is reset)

ImageFile.LOAD_TRUNCATED_IMAGES = _tolerant

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation.generation import (
    Answer,
    GenerationError,
    Generator,
    Picture,
    Question,
    load_assistant,
)


class UnansweredError(RuntimeError):
    """Some requests got no answer. lmms-eval has no notion of that, so a plain run stops instead of scoring ""."""


class AnsweredElsewhere(RuntimeError):
    """Other processes are answering some units of this benchmark."""


class AssistantModel(lmms):
    """Simple-style lmms-eval model: pictures first, then the text, greedy answers.

    `control`: None, "blind" (the same prompt as text only) or "wrong_picture" (`picture_docs` maps the index of a
    question to the index of the row whose picture it gets). `earlier`: the turns before every question
    (`fewshot.earlier_turns`). Requests without an answer are kept in `errors`,
    (task, index) -> reason, and raise UnansweredError at the end unless `record_errors`.

    `units` (`sweep.Units`) stores the answers slice by slice and shares the slices with other processes; questions whose index is in
    `checked` are asked once more, alone, through plain transformers (`checks`: index -> what came of it). `num_cut` counts answers
    that ended at the limit of new tokens, `tokens_seen` the tokens of each picture.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 16,
        device: str | None = None,
        precision: str = "auto",
        max_new_tokens: int = 64,
        source_size: int | None = None,
        tiling: str | None = None,
        control: str | None = None,
        generator: Generator | None = None,
        record_errors: bool = False,
        picture_docs: Mapping[int, int] | None = None,
        earlier: Mapping[str, Any] | None = None,
        on_progress: Callable[[int], None] | None = None,
        max_batch_size: int | None = None,
        units: Any = None,
        checked: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        if generator is None:
            if pretrained is None:
                raise UserError("model_args: pretrained=<folder of the assistant> is missing")
            model, processor = load_assistant(pretrained, precision, device)
            generator = Generator(model, processor, int(batch_size), int(max_new_tokens), source_size, tiling)
        if control not in (None, "blind", "wrong_picture"):
            raise UserError(f"control: {control!r} is none of blind, wrong_picture")
        if control == "wrong_picture" and picture_docs is None:
            raise UserError("control: wrong_picture needs picture_docs, which `aimv2-vlm eval` works out")
        self.generator, self.control, self.picture_docs = generator, control, picture_docs or {}
        self.record_errors, self.on_progress, self.earlier = record_errors, on_progress, earlier
        self.units, self.checked = units, checked
        self.errors: dict[tuple[str, int], str] = {}
        self.tokens_seen: dict[str, int] = {}
        self.checks: dict[int, dict[str, Any]] = {}
        self.num_cut, self.seconds = 0, 0.0

    @property
    def device(self) -> Any:
        return self.generator.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests; each is (context, gen_kwargs, doc_to_visual, doc_id, task, split).

        Raises AnsweredElsewhere while other processes answer some of them.
        """
        size = self.units.size if self.units is not None else max(1, len(requests))
        answers: list[str] = []
        for number, start in enumerate(range(0, len(requests), size)):
            part = requests[start : start + size]
            work = partial(self._answer_unit, part)
            unit = self.units.run(number, work) if self.units is not None else work()
            if unit is not None:
                answers += self._take(part, unit)
        if len(answers) < len(requests):
            raise AnsweredElsewhere(f"{len(requests) - len(answers)} of {len(requests)} questions")
        if self.errors and not self.record_errors:
            where, reason = next(iter(self.errors.items()))
            raise UnansweredError(f"{len(self.errors)} requests have no answer; {where[0]} {where[1]}: {reason}")
        return answers

    def _answer_unit(self, requests: Sequence[Instance]) -> dict[str, Any]:
        """{"answers": a dict for each request, "tokens": picture -> tokens}, as JSON can hold it."""
        answers: list[dict[str, Any]] = [{} for _ in requests]
        groups: dict[tuple, list[int]] = defaultdict(list)
        self.generator.tokens_seen.clear()
        for i, request in enumerate(requests):
            groups[_greedy_settings(request.args[1], self.generator.max_new_tokens)].append(i)
        for (max_new_tokens, until), members in groups.items():
            for chunk in self._chunks(requests, members):
                asked = {i: self._after_shots(self._question(requests[i])) for i in chunk}
                good = [i for i, question in asked.items() if isinstance(question, Question)]
                given = self.generator.answer([asked[i] for i in good], max_new_tokens, self.on_progress)
                results = asked | dict(zip(good, given, strict=True))
                for i, answer in results.items():
                    answers[i] = _as_stored(answer, until)
                    if requests[i].args[3] in self.checked and not isinstance(answer, GenerationError):
                        answers[i]["check"] = self._check(asked[i], answer, max_new_tokens)
        return {"answers": answers, "tokens": {str(key): num for key, num in self.generator.tokens_seen.items()}}

    def _check(self, question: Question, answer: Answer, max_new_tokens: int) -> dict[str, Any] | None:
        if not self.generator.can_check(question):
            return None
        try:
            return asdict(self.generator.check(question, answer, max_new_tokens))
        except Exception as error:  # plain transformers fails where the batch did not: nothing was compared
            return {"ours": str(answer), "stock": None, "gap": None, "tie": False, "flip": False, "error": f"{type(error).__name__}: {error}"}

    def _take(self, requests: Sequence[Instance], unit: Mapping[str, Any]) -> list[str]:
        self.tokens_seen |= unit["tokens"]
        self.seconds += unit.get("seconds", 0.0)
        answers = []
        for request, stored in zip(requests, unit["answers"], strict=True):
            *_, doc_id, task, _ = request.args
            self.num_cut += stored["cut"]
            if stored.get("check") and stored["check"]["stock"] is not None:
                self.checks[doc_id] = stored["check"]
            if stored["error"] is not None:
                self.errors[task, doc_id] = stored["error"]
            # Never scored where there is an error: the sweep leaves out what stands in `errors`.
            answers.append(stored["answer"] if stored["error"] is None else f"<no answer: {stored['error']}>")
        return answers

    def _chunks(self, requests: Sequence[Instance], members: list[int]) -> list[list[int]]:
        """All at once where pictures open one by one; else groups small enough to hold their decoded pictures."""
        if all("picture_id" in self._features(requests[i]) for i in members):
            return [members]
        size = 8 * self.generator.batch_size
        return [members[start : start + size] for start in range(0, len(members), size)]

    def _features(self, request: Instance) -> Mapping:
        *_, task, split = request.args
        return self.task_dict[task][split].features

    def _after_shots(self, question: Question | GenerationError) -> Question | GenerationError:
        if not self.earlier or isinstance(question, GenerationError):
            return question
        pictures = (*self.earlier["pictures"], *question.pictures)
        places = (*self.earlier["places"], len(question.pictures))
        return Question(question.prompt, pictures, self.earlier["before"], places)

    def _question(self, request: Instance) -> Question | GenerationError:
        prompt, _, doc_to_visual, doc_id, task, split = request.args
        if self.control == "blind":
            return Question(prompt)
        docs = self.task_dict[task][split]
        if self.control == "wrong_picture":
            doc_id = self.picture_docs[doc_id]
        if "picture_id" in docs.features:
            key = (task, docs[doc_id]["picture_id"])
            return Question(prompt, (Picture(key, lambda: doc_to_visual(docs[doc_id])[0]),))
        try:
            images = doc_to_visual(docs[doc_id]) or []
        except Exception as error:
            return GenerationError(f"picture of question {doc_id}: {type(error).__name__}: {error}")
        return Question(prompt, tuple(Picture((task, _content(image)), lambda image=image: image) for image in images))

    def clean(self) -> None:
        """Nothing: the checkpoint answers the next benchmark too (lmms-eval would collect garbage for a second)."""

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("aimv2_vlm answers by generation only; use a generate_until task")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("aimv2_vlm answers one turn only; use a generate_until task")


def _content(image: Image.Image) -> str:
    """Equal for equal pictures: questions about one picture then share its encoding, whatever a data set calls it."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, key=f"{image.mode}{image.size}".encode()).hexdigest()


def _as_stored(answer: Answer | GenerationError, until: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(answer, GenerationError):
        return {"answer": None, "error": str(answer), "cut": False}
    text = str(answer)
    for stop in until:
        text = text.split(stop)[0]
    return {"answer": text.strip(), "error": None, "cut": answer.cut}


def _greedy_settings(gen_kwargs: Mapping, max_new_tokens: int) -> tuple[int, tuple[str, ...]]:
    if gen_kwargs.get("do_sample") and gen_kwargs.get("temperature", 1.0) > 0 or gen_kwargs.get("num_beams", 1) > 1:
        raise UserError(f"generation_kwargs {dict(gen_kwargs)}: answers are greedy; set do_sample: false, num_beams: 1")
    until = gen_kwargs.get("until") or ()
    return int(gen_kwargs.get("max_new_tokens", max_new_tokens)), (until,) if isinstance(until, str) else tuple(until)
