"""Talking: prompts are tuning's, answers are stock transformers', pictures are refused whole, one user's words stay theirs."""

from __future__ import annotations

import base64
import io
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_cli
from PIL import Image
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from aimv2_vlm.config import UserError
from aimv2_vlm.data.chat import ChatFormat, train_chat_tokenizer
from aimv2_vlm.data.conversations import IMAGE, Turn
from aimv2_vlm.data.transforms import MAX_BYTES
from aimv2_vlm.evaluation import generation
from aimv2_vlm.models.assistant import build_assistant
from aimv2_vlm.serve.chat import Chat, Session

QUESTIONS = ["What is shown?", "Which color?", "How many <|eot_id|> are there?"]


def make_assistant(folder: Path, grid: str, num_positions: int = 4096, template: str = "llama3") -> Path:
    """A checkpoint that says random words and never ends by itself: 28 px views, 4 tokens each."""
    train_chat_tokenizer(["What is shown? a red circle 12", "user assistant yes no"] * 10, folder / "tokenizer", 400)
    torch.manual_seed(1)
    encoder = Aimv2VisionModel(Aimv2VisionConfig(
        image_size=28, patch_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, use_head=False,
        tie_last_hidden_states=True, initializer_range=0.2))  # fmt: skip
    llama = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=num_positions,
                 initializer_range=0.3)  # fmt: skip
    model, processor = build_assistant(encoder, None, grid, tokenizer=str(folder / "tokenizer"), llm_config=llama, template=template,
                                       image_mean=[0.5] * 3, image_std=[0.25] * 3)  # fmt: skip
    with torch.no_grad():
        for number in range(len(model.lm_head.weight)):
            if not re.fullmatch(r" \w+", processor.tokenizer.decode([number])):
                model.lm_head.weight[number] = 0
    model.save_pretrained(folder / "final")
    processor.save_pretrained(folder / "final")
    return folder / "final"


def make_picture(path: Path, width: int = 56, height: int = 56, seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def make_bomb(path: Path, side: int = 60_000) -> Path:
    """A PNG whose header names 3.6 gigapixels."""
    chunk = lambda kind, data: len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)  # noqa: E731
    header = side.to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    return path


@pytest.fixture(scope="module", params=["1x1", "2x2"])
def checkpoint(request, tmp_path_factory) -> Path:
    return make_assistant(tmp_path_factory.mktemp(f"talk_{request.param}"), request.param)


@pytest.fixture(scope="module")
def model(checkpoint) -> Chat:
    return Chat.open(checkpoint, max_new_tokens=8)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    return make_picture(tmp_path_factory.mktemp("pictures") / "square.png")


def talk(model: Chat, picture: Path | None, questions=QUESTIONS) -> Session:
    session = Session()
    if picture:
        model.show(session, picture)
    for question in questions:
        pieces = list(model.ask(session, question))
        assert "".join(pieces).strip() == session.reply.text
    return session


@pytest.mark.parametrize("with_picture", [True, False])
def test_the_prompt_of_every_turn_is_the_one_tuning_assembles(model, picture, with_picture):
    session = talk(model, picture if with_picture else None)
    assert len(session.turns) == 6 and all(said for _, said in session.turns), "the made model says nothing: choose another seed"
    chat_format = ChatFormat(model.tokenizer, model.processor.chat_template, model.processor.image_token)
    question = "And </s> or <|end_of_text|>?"
    turns = [Turn(role, said) for role, said in (*session.turns, ("user", question))]
    if with_picture:
        turns[0] = Turn("user", f"{IMAGE}\n{turns[0].text}")
    expected = chat_format.prompt_ids(turns, [session.shown.num_tokens] if with_picture else [])
    _, length, generate = model._prompt(session, question)
    ids = generate.args[1][0]
    assert ids == expected and length == len(ids)
    assert ids.count(model.image_id) == (session.shown.num_tokens if with_picture else 0)


def test_answers_are_those_of_plain_transformers_turn_for_turn(model, picture):
    """Square picture: what tuning pads is not in the way. No control token is typed: plain transformers would obey it."""
    questions = QUESTIONS[:2]
    session = talk(model, picture, questions)
    said = []
    for question in questions:
        said.append({"role": "user", "content": [{"type": "image"}] * (not said) + [{"type": "text", "text": question}]})
        prompt = model.processor.apply_chat_template(said, add_generation_prompt=True)
        inputs = model.processor(images=Image.open(picture), text=prompt, add_special_tokens=False, return_tensors="pt").to(model.model.dtype)
        output = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = model.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        said.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    assert [said["content"][-1]["text"] for said in said] == [text for _, text in session.turns]


def test_a_class_that_gets_pixels_with_every_question_says_the_same(model, picture, checkpoint, monkeypatch):
    shared = talk(model, picture, QUESTIONS[:2])
    monkeypatch.setattr(generation, "FEATURE_SHARING", ())
    plain = Chat.open(checkpoint, max_new_tokens=8)
    session = talk(plain, picture, QUESTIONS[:2])
    assert session.shown.features is None and session.turns == shared.turns and session.shown.num_tokens == shared.shown.num_tokens
    assert (session.reply.num_prompt_tokens, session.reply.num_answer_tokens) == (shared.reply.num_prompt_tokens, shared.reply.num_answer_tokens)
    with pytest.raises(UserError, match=r"<\|eot_id\|> is a control token"):
        list(plain.ask(session, QUESTIONS[2]))


def test_tokens_are_counted(model, picture):
    session = talk(model, picture, QUESTIONS[:1])
    reply = session.reply
    assert reply.num_image_tokens == (4 if model.views.single else 4 + 4 * 4 + 4) == len(session.shown.features)
    assert 1 <= reply.num_answer_tokens <= 8 and reply.num_prompt_tokens > reply.num_image_tokens
    assert f"{reply.num_image_tokens} tokens of picture" in str(reply) and "forgotten" not in str(reply)


def test_a_stopped_answer_stays_as_far_as_it_came_and_the_talk_goes_on(checkpoint, picture):
    model = Chat.open(checkpoint, max_new_tokens=2000)
    session = Session()
    model.show(session, picture)
    for number, piece in enumerate(model.ask(session, "What?")):
        if number == 3:
            session.stop.set()
    assert 3 <= session.reply.num_answer_tokens < 1000
    assert session.turns == (("user", "What?"), ("assistant", session.reply.text)) and session.reply.text
    pieces = model.ask(session, "And now?")
    next(pieces)
    pieces.close()  # as when a visitor leaves
    assert session.turns[2] == ("user", "And now?")
    stopped = session.turns
    pieces = model.ask(session, "More?")
    next(pieces)
    session.begin(session.shown)
    list(pieces)
    assert session.turns == () and session.reply is None and stopped, "an answer that began before is no part of a new conversation"


def test_what_no_longer_fits_is_left_out_by_whole_turns_and_said(tmp_path, picture):
    model = Chat.open(make_assistant(tmp_path, "1x1", num_positions=128), max_new_tokens=12)
    session, forgotten = Session(), 0
    model.show(session, picture)
    for number in range(12):
        before = session.turns
        list(model.ask(session, f"Question {number}?"))
        reply = session.reply
        assert reply.num_prompt_tokens + reply.num_answer_tokens <= 128 and reply.num_image_tokens == 4
        assert session.turns[:-2] == before[2 * reply.num_forgotten :], "only whole questions with their answers go, the oldest first"
        forgotten += reply.num_forgotten
        assert ("forgotten" in str(reply)) == bool(reply.num_forgotten)
    assert 0 < forgotten < 12
    kept = session.turns
    with pytest.raises(UserError, match="ask a shorter question"):
        list(model.ask(session, "a b c d e f g h i j " * 40))
    assert session.turns == kept
    assert list(model.ask(session, "Short?"))


def test_a_picture_is_shown_whole_or_refused_with_the_reason(model, picture, tmp_path):
    session = talk(model, picture, QUESTIONS[:1])
    before = (session.shown, session.turns)
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    (tmp_path / "cut.jpg").write_bytes(make_picture(tmp_path / "whole.jpg", 200, 200).read_bytes()[:3000])
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate(MAX_BYTES + 1)
    make_bomb(tmp_path / "bomb.png")
    reasons = {
        "text.png": "not a picture", "cut.jpg": "no picture to show", "large.png": "over the limit of 40000000",
        "bomb.png": "60000 x 60000 pixels, over", "nowhere.png": "No such file", ".": "directory",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as refused:
            model.show(session, tmp_path / name)
        assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)
        assert (session.shown, session.turns) == before
    model.show(session, make_picture(tmp_path / "other.png", 90, 30))
    assert session.turns == () and (session.shown.height, session.shown.width) == (30, 90)


def test_two_who_talk_at_once_hear_what_each_would_hear_alone(model, picture, tmp_path):
    other = make_picture(tmp_path / "other.png", seed=5)
    alone = [talk(model, path).turns for path in (picture, other)]
    with ThreadPoolExecutor(2) as pool:
        together = [session.turns for session in pool.map(lambda path: talk(model, path), (picture, other))]
    assert together == alone and alone[0] != alone[1]


def test_an_error_while_the_model_answers_is_one_line_and_the_talk_goes_on(model, picture, monkeypatch):
    session = talk(model, picture, QUESTIONS[:1])
    before = session.turns

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "generate", fails)
        with pytest.raises(UserError, match="no answer: RuntimeError: out of memory"):
            list(model.ask(session, "What?"))
    assert session.turns == before and list(model.ask(session, "What?"))


# ------------------------------------------------------------------------------------------------ terminal


def errors(done) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error:") or "Traceback" in line]


def test_the_terminal_obeys_its_commands(checkpoint, picture, monkeypatch):
    lines = iter(["/help", f"/image {picture}", "What is shown?", "/new", "", "/image", "Which color?", "/etc/hosts?"])

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    done = run_cli("chat", checkpoint, "--image", picture, "--max-new-tokens", 4)
    assert done.stdout.count("56 x 56 pixels") == 2 and "/image FILE" in done.stdout and "[no picture]" in done.stdout
    assert not errors(done)


def test_wrong_commands_are_named_and_the_talk_goes_on(checkpoint, monkeypatch):
    lines = iter(["/nonsense", "/image nowhere.png", "What is shown?", "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    done = run_cli("chat", checkpoint, "--max-new-tokens", 4)
    assert [line.split(":")[:2] for line in errors(done)] == [["error", " /nonsense"], ["error", " nowhere.png"]]
    assert done.stdout.strip() and next(lines) == "never read"


def test_bytes_that_are_no_text_are_asked_about_all_the_same(checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What \xff is shown?\n"), encoding="utf-8"))
    done = run_cli("chat", checkpoint, "--max-new-tokens", 4)
    assert done.stdout.strip() and not errors(done)


def test_keys_of_the_page_are_not_passed_over_in_the_terminal(checkpoint):
    done = run_cli("chat", checkpoint, "--port", 7999, check=False)
    assert done.returncode == 2 and "add --web" in done.stderr and len(errors(done)) == 1


def test_a_picture_that_is_none_ends_the_start_with_one_line(checkpoint, tmp_path):
    done = run_cli("chat", checkpoint, "--image", tmp_path / "nowhere.png", check=False)
    assert done.returncode == 2 and len(errors(done)) == 1 and "nowhere.png: no picture to show" in errors(done)[0]


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(tmp_path, picture):
    """A process of its own in a real terminal: the interrupt reaches the answer only, the next question is answered."""
    checkpoint = make_assistant(tmp_path, "1x1", num_positions=100_000)
    # a fresh Python: a fork of this one has its threads' locks without its threads
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from aimv2_vlm.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["chat", str(checkpoint), "--image", str(picture), "--max-new-tokens", "50000"]
    terminal, side = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code, *words], stdin=side, stdout=side, stderr=side, start_new_session=True)
    os.close(side)
    shown = ""

    def wait(until, seconds: float = 60) -> None:
        nonlocal shown
        end = time.monotonic() + seconds
        while not until():
            assert select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0], shown[-2000:]
            try:
                shown += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # how Linux reports that nobody holds the terminal's other side any more
                pytest.fail(f"chat has ended with {child.wait()}: {shown[-2000:]}")

    try:
        wait(lambda: "you> " in shown, 180)
        assert "Ctrl-C stops an answer" in shown and "4 tokens]" in shown
        for number in (1, 2):
            os.write(terminal, b"What is shown?\n")
            wait(lambda: shown.count("What is shown?") == number)
            streamed = len(shown) + 40
            wait(lambda: len(shown) >= streamed)  # an answer that would take minutes is under way
            child.send_signal(signal.SIGINT)
            wait(lambda: shown.count("[stopped]") == number and shown.count("you> ") == number + 1)
        os.write(terminal, b"\x04")
        assert child.wait(timeout=60) == 0 and "Traceback" not in shown
    finally:
        child.kill()
        child.wait()
        os.close(terminal)


# ------------------------------------------------------------------------------------------------ other people's programs


def test_transformers_serve_answers_an_openai_client_as_the_terminal_does(checkpoint, model, picture):
    """The picture travels as a data URL. Square, so that no padding is missed; an assistant is stock, this package is not asked."""
    openai, httpx = (pytest.importorskip(name, reason="transformers[serving] is not installed") for name in ("openai", "httpx"))
    serve = pytest.importorskip("transformers.cli.serve")
    if not serve.is_serve_available():
        pytest.skip("transformers[serving] is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve.Serve(force_model=str(checkpoint), host="127.0.0.1", port=port, dtype="float32", device="cpu", non_blocking=True)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{address}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert time.monotonic() < end
                time.sleep(0.1)
        url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTIONS[0]}]
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        asked = dict(model=str(checkpoint), messages=[{"role": "user", "content": content}], max_tokens=8)
        whole = client.chat.completions.create(**asked).choices[0].message.content
        streamed = "".join(part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True) if part.choices)
    finally:
        server.kill_server()
    expected = talk(model, picture, QUESTIONS[:1]).turns[1][1]
    assert whole.strip() == streamed.strip() == expected
