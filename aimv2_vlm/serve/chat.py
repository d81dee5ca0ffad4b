"""`aimv2-vlm chat`: a conversation with an assistant in the terminal."""

from __future__ import annotations

import sys
from threading import Thread

from aimv2_vlm.config import UserError
from aimv2_vlm.data.transforms import BadImage
from aimv2_vlm.evaluation.generation import load_assistant, open_picture, prepare_for

HELP = "/image FILE shows a new picture, /reset forgets the conversation, /quit ends"


def chat(model_path: str, image: str | None = None, max_new_tokens: int = 256) -> int:
    """Read lines, stream answers. Works with any checkpoint that AutoModelForImageTextToText and AutoProcessor load."""
    model, processor = load_assistant(model_path)
    history: list[dict] = []
    picture = read_picture(image, processor) if image else None
    print(HELP)
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return 0
        if line in ("/quit", "/exit"):
            return 0
        if line == "/reset":
            history = []
        elif line.startswith("/image"):
            try:
                picture, history = read_picture(line.removeprefix("/image").strip(), processor), []
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
        elif line:
            content = [{"type": "text", "text": line}]
            if not history and picture is not None:
                content.insert(0, {"type": "image"})
            history.append({"role": "user", "content": content})
            answer = stream_answer(model, processor, history, picture, max_new_tokens)
            history.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def read_picture(file: str, processor):
    """The picture as `stream_answer` takes it. Raises UserError."""
    try:
        return prepare_for(processor, open_picture(file))
    except (OSError, BadImage) as error:
        raise UserError(f"{file or '/image'}: no picture to show: {error}") from None


def stream_answer(model, processor, history: list[dict], picture, max_new_tokens: int) -> str:
    """Print the answer to the last turn as it comes; returns it. Raises UserError when generation fails."""
    from transformers import TextIteratorStreamer

    prompt = processor.apply_chat_template(history, add_generation_prompt=True)
    inputs = processor(text=prompt, images=picture, add_special_tokens=False, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    problem: list[Exception] = []

    def work() -> None:
        try:
            model.generate(**inputs, streamer=streamer, max_new_tokens=max_new_tokens)
        except Exception as error:  # shown to the user; the streamer must end in any case
            problem.append(error)
            streamer.end()

    thread = Thread(target=work)
    thread.start()
    answer = ""
    for piece in streamer:
        print(piece, end="", flush=True)
        answer += piece
    thread.join()
    print()
    if problem:
        raise UserError(f"generation failed: {problem[0]}")
    return answer.strip()
