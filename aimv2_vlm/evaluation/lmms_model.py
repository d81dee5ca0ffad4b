"""The lmms-eval model `aimv2_vlm`: any assistant checkpoint, answered by `generation.Generator`.

    lmms_eval --model aimv2_vlm --model_args pretrained=runs/sft/final --include_path .../evaluation/tasks \
        --tasks scenes_print

Importing this module imports lmms-eval (7 s, 1 GB), which makes Pillow accept truncated pictures; that is undone here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import ImageFile

_tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import Task  # noqa: F401  (the module that sets the flag: import it before it is reset)

ImageFile.LOAD_TRUNCATED_IMAGES = _tolerant

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation.generation import (
    GenerationError,
    Generator,
    Picture,
    Question,
    load_assistant,
)


class UnansweredError(RuntimeError):
    """Some requests got no answer. lmms-eval has no notion of that, so a plain run stops instead of scoring ""."""


class AssistantModel(lmms):
    """Simple-style lmms-eval model: pictures first, then the text, greedy answers.

    `control`: None, "blind" (the same prompt as text only) or "wrong_picture" (`picture_docs` maps the index of a
    question to the index of the row whose picture it gets). Requests without an answer are kept in `errors`,
    (task, index) -> reason, and raise UnansweredError at the end unless `record_errors`.
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
        on_progress: Callable[[int], None] | None = None,
        max_batch_size: int | None = None,
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
        self.record_errors, self.on_progress = record_errors, on_progress
        self.errors: dict[tuple[str, int], str] = {}

    @property
    def device(self) -> Any:
        return self.generator.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests; each is (context, gen_kwargs, doc_to_visual, doc_id, task, split)."""
        answers = [""] * len(requests)
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_greedy_settings(request.args[1], self.generator.max_new_tokens)].append(i)
        for (max_new_tokens, until), members in groups.items():
            for chunk in self._chunks(requests, members):
                asked = [self._question(requests[i]) for i in chunk]
                good = [k for k, question in enumerate(asked) if isinstance(question, Question)]
                given = self.generator.answer([asked[k] for k in good], max_new_tokens, self.on_progress)
                results: list = list(asked)
                for k, text in zip(good, given, strict=True):
                    results[k] = text
                for i, text in zip(chunk, results, strict=True):
                    answers[i] = self._recorded(requests[i], text, until)
        if self.errors and not self.record_errors:
            where, reason = next(iter(self.errors.items()))
            raise UnansweredError(f"{len(self.errors)} requests have no answer; {where[0]} {where[1]}: {reason}")
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
        pictures = (Picture((task, doc_id, k), lambda image=image: image) for k, image in enumerate(images))
        return Question(prompt, tuple(pictures))

    def _recorded(self, request: Instance, answer: str | GenerationError, until: tuple[str, ...]) -> str:
        *_, doc_id, task, _ = request.args
        if isinstance(answer, GenerationError):
            self.errors[task, doc_id] = str(answer)
            return f"<no answer: {answer}>"  # never scored: the sweep leaves out what stands in `errors`
        for stop in until:
            answer = answer.split(stop)[0]
        return answer.strip()

    def clean(self) -> None:
        """Nothing: the checkpoint answers the next benchmark too (lmms-eval would collect garbage for a second)."""

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("aimv2_vlm answers by generation only; use a generate_until task")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("aimv2_vlm answers one turn only; use a generate_until task")


def _greedy_settings(gen_kwargs: Mapping, max_new_tokens: int) -> tuple[int, tuple[str, ...]]:
    if gen_kwargs.get("do_sample") and gen_kwargs.get("temperature", 1.0) > 0 or gen_kwargs.get("num_beams", 1) > 1:
        raise UserError(f"generation_kwargs {dict(gen_kwargs)}: answers are greedy; set do_sample: false, num_beams: 1")
    until = gen_kwargs.get("until") or ()
    return int(gen_kwargs.get("max_new_tokens", max_new_tokens)), (until,) if isinstance(until, str) else tuple(until)
