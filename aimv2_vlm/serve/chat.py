"""`aimv2-vlm chat`: a conversation with an assistant in the terminal, and the `Chat` that the web page shares."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import torch
from PIL import Image

from aimv2_vlm.config import UserError
from aimv2_vlm.data.shards import too_many_bytes
from aimv2_vlm.data.tiling import Tiling
from aimv2_vlm.data.transforms import MAX_BYTES, BadImage
from aimv2_vlm.evaluation.generation import GenerationError, Generator, Picture, Question, load_assistant, open_picture

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what would steer the terminal

HELP = """/image FILE  talk about this picture (begins anew); /image alone: about none
/new         begin anew with the same picture
/help        this
/quit        end, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Shown:
    """The picture of a conversation: its size as the user has it, what the decoder needs of it."""

    height: int
    width: int
    num_tokens: int | None  # None: the class does not tell
    features: torch.Tensor | None  # (tokens, width of the decoder) where the class shares features,
    picture: Image.Image | None  # else the picture, which is encoded with every question


@dataclass(frozen=True)
class Reply:
    """One answer. `num_image_tokens` are part of `num_prompt_tokens`; `num_forgotten` questions were cut off before it."""

    text: str
    num_image_tokens: int
    num_prompt_tokens: int
    num_answer_tokens: int  # with the end token
    num_forgotten: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.num_image_tokens} tokens of picture, {self.num_prompt_tokens - self.num_image_tokens} of text, "
            f"{self.num_answer_tokens} of answer, {self.seconds:.1f} s{self.forgotten and '; ' + self.forgotten}"
        )

    @property
    def forgotten(self) -> str:
        """What is to be said about the turns that no longer fit; empty if all do."""
        if not self.num_forgotten:
            return ""
        return f"the context is full: the first {self.num_forgotten} question{'s' * (self.num_forgotten > 1)} forgotten"


@dataclass
class Session:
    """One user's conversation: at most one picture, what was said about it, the last reply. The model is `Chat`'s."""

    shown: Shown | None = None
    turns: tuple[tuple[str, str], ...] = ()  # (role, text)
    reply: Reply | None = None
    stop: Event = field(default_factory=Event)  # set from any thread: the answer under way ends, what was said stays
    _begun: object = field(default_factory=object)  # another one for every beginning

    def begin(self, shown: Shown | None) -> None:
        """Begin anew with this picture. An answer under way stops and is no part of the new conversation."""
        self.stop.set()
        self.shown, self.turns, self.reply, self._begun = shown, (), None, object()


class Chat(Generator):
    """A model to talk with: greedy answers in pieces, one at a time, whoever asks.

    Takes whatever AutoModelForImageTextToText opens. Prompts are those of evaluation, hence of stock inference: what a
    user types never becomes a control token. Raises UserError where the checkpoint cannot answer about any picture.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int = 256) -> None:
        super().__init__(model, processor, batch_size=1, max_new_tokens=max_new_tokens)
        try:
            self.views: Tiling | None = Tiling.from_processor(processor)
        except (AttributeError, KeyError, TypeError, UserError):  # cut in another way: where views lie is unknown
            self.views = None
        self._one_at_a_time = Lock()

    @classmethod
    def open(cls, path: str | Path, max_new_tokens: int = 256) -> Chat:
        """Load a checkpoint. Raises UserError."""
        return cls(*load_assistant(path), max_new_tokens)

    def grid_of(self, shown: Shown) -> Tiling | None:
        """How a picture is cut; None where it is one view or the way is unknown."""
        chosen = None if self.views is None else self.views.at(shown.height, shown.width)
        return None if chosen is None or chosen.single else chosen

    def show(self, session: Session, source: str | Path, name: str | None = None) -> Image.Image:
        """Begin anew with the picture in this file; returns it, upright RGB. Raises UserError, and then nothing changes."""
        name = name or str(source)
        try:
            if (size := Path(source).stat().st_size) > MAX_BYTES:  # before any of it is read
                raise BadImage(too_many_bytes(size, MAX_BYTES))
            picture = open_picture(source)
        except OSError as error:
            raise UserError(f"{name}: no picture to show: {error.strerror or error}") from None
        except BadImage as error:
            raise UserError(f"{name}: no picture to show: {error}") from None
        height, width = picture.height, picture.width
        if self.views is not None and not self.views.shows_something(height, width):
            raise UserError(f"{name}: {width} x {height} pixels are too long and narrow for {self.views} tiles")
        key = Picture(name, lambda: picture)
        try:
            if self.share_features:
                features = self._encode({name: key})[name]
                if isinstance(features, GenerationError):
                    raise features
                shown = Shown(height, width, len(features), features, None)
            else:
                prepared = self._open(key)
                if isinstance(prepared, GenerationError):
                    raise prepared
                input_ids = self._plain_inputs([Question("", (key,))], [[prepared]])["input_ids"]
                num_tokens = None if self.image_id is None else int((input_ids == self.image_id).sum())
                shown = Shown(height, width, num_tokens, None, prepared)
        except Exception as error:  # any class may stand here, and each processor has its own reasons
            raise UserError(f"{name}: the model cannot see it: {error}") from error
        finally:
            self.tokens_seen.clear()  # visitors' file names are nothing to keep
        session.begin(shown)
        return picture

    def ask(self, session: Session, text: str) -> Iterator[str]:
        """The answer in pieces as it comes; `session.stop` or closing the iterator ends it. Then `session.reply` is the whole.

        The oldest questions and their answers are left out where the decoder's positions do not suffice (`Reply.forgotten`).
        Raises UserError.
        """
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        began, begun = time.monotonic(), session._begun
        session.reply = None
        session.stop = stop = Event()  # of this answer alone
        turns, length, generate = self._prompt(session, text)
        room = self.max_new_tokens if self.num_positions is None else min(self.num_positions - length, self.max_new_tokens)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        total, answer, problem = length, [], []

        def stopped(input_ids_BS: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            nonlocal total
            total = input_ids_BS.shape[1]
            return input_ids_BS.new_full((len(input_ids_BS),), stop.is_set(), dtype=torch.bool)

        def work() -> None:
            try:
                with self._one_at_a_time:
                    answer.extend(generate(room, streamer=streamer, stopping_criteria=StoppingCriteriaList([stopped])))
            except Exception as error:  # raised again below; the streamer must end in any case
                problem.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()
            if answer and session._begun is begun:
                forgotten = (len(session.turns) - len(turns)) // 2
                num_image = (session.shown.num_tokens or 0) if session.shown else 0
                session.reply = Reply(answer[0], num_image, length, total - length, forgotten, time.monotonic() - began)
                session.turns = turns
                if answer[0]:  # a question without an answer is no part of what was said
                    session.turns += (("user", text), ("assistant", answer[0]))
        if problem:
            raise UserError(f"no answer: {type(problem[0]).__name__}: {problem[0]}") from problem[0]

    def _prompt(self, session: Session, text: str) -> tuple[tuple[tuple[str, str], ...], int, Callable[..., list[str]]]:
        """The turns that fit before this question, the prompt's tokens, and what generates. Raises UserError."""
        shown, turns = session.shown, session.turns
        pictures = () if shown is None else (Picture("picture", lambda: shown.picture),)
        if not self.share_features and (token := next((t for t in self.tokenizer.get_added_vocab() if t.strip() and t in text), None)):
            raise UserError(f"{token} is a control token of this model and cannot be asked about")
        # An eighth of the positions is kept for the answer as long as there are turns to leave out.
        spare = 0 if self.num_positions is None else min(self.max_new_tokens, self.num_positions // 8)
        while True:
            question = Question(text, pictures, before=turns)
            try:
                if self.share_features:
                    features = [] if shown is None else [shown.features]
                    ids = self._expanded_ids(question, features)
                    length, generate = len(ids), partial(self._generate_ids, [0], {0: ids}, {0: features})
                else:
                    inputs = self._plain_inputs([question], [[] if shown is None else [shown.picture]])
                    length, generate = inputs["input_ids"].shape[1], partial(self._generate_inputs, inputs)
                    if self.num_positions is not None and length >= self.num_positions:
                        raise GenerationError(f"prompt of {length} tokens fills the decoder's {self.num_positions} positions")
                if not turns or self.num_positions is None or length + spare <= self.num_positions:
                    return turns, length, generate
            except GenerationError as error:
                if not turns:
                    raise UserError(f"{error}; ask a shorter question") from None
            except Exception as error:  # templates and processors of any class
                raise UserError(f"no prompt: {type(error).__name__}: {error}") from error
            turns = turns[2:]

    @torch.inference_mode()
    def _generate_inputs(self, inputs: dict[str, Any], max_new_tokens: int, **more: Any) -> list[str]:
        """The answer of a class that gets pixels with every question."""
        return self._decode(self._generate(inputs, max_new_tokens, **more)[:, inputs["input_ids"].shape[1] :], max_new_tokens)


# ------------------------------------------------------------------------------------------------ terminal


def chat(model_path: str, image: str | None = None, max_new_tokens: int = 256) -> int:
    """Read lines, stream answers: one process, one conversation. Raises UserError where it cannot begin."""
    model, session = Chat.open(model_path, max_new_tokens), Session()
    at_terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text in the terminal's encoding
    if at_terminal:
        import readline  # noqa: F401  makes input() edit lines

        print(HELP, flush=True)
    if image:
        obey(model, session, f"/image {image}")
    while True:
        try:
            line = input("you> " if at_terminal else "").strip()
        except EOFError:
            print(end="\n" * at_terminal)
            return 0
        except KeyboardInterrupt:
            print("\nCtrl-D ends", flush=True)
            continue
        if line in ("/quit", "/exit"):
            return 0
        try:
            obey(model, session, line)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def obey(model: Chat, session: Session, line: str) -> None:
    """Do what one line of the terminal says. Raises UserError."""
    command, _, rest = line.partition(" ")
    if command == "/image" and rest.strip():
        model.show(session, Path(rest.strip()).expanduser())
        print(f"[{describe(model, session.shown)}]", flush=True)
    elif command == "/image":
        session.begin(None)
        print("[no picture]", flush=True)
    elif command == "/new":
        session.begin(session.shown)
    elif command == "/help":
        print(HELP, flush=True)
    elif command.startswith("/") and "/" not in command[1:]:
        raise UserError(f"{command}: no such command; /help names them")
    elif line:
        with closing(model.ask(session, line)) as pieces:
            try:
                for piece in pieces:
                    print(CONTROLS.sub("\ufffd", piece), end="", flush=True)
                print(flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", flush=True)
        if session.reply is not None and session.reply.forgotten:
            print(f"[{session.reply.forgotten}]", flush=True)


def describe(model: Chat, shown: Shown) -> str:
    """One line about a picture: its size, how it is cut, what it costs."""
    parts = [f"{shown.width} x {shown.height} pixels"]
    if (chosen := model.grid_of(shown)) is not None:
        parts.append(f"{chosen} tiles")
    if shown.num_tokens is not None:
        parts.append(f"{shown.num_tokens} tokens")
    return ", ".join(parts)
