"""`aimv2-vlm chat --web`: the same conversation in a page (Gradio), for whoever can open the address.

The page loads nothing from elsewhere and the server asks nothing of anybody: no telemetry, no share link, no address
that a client names is fetched. A picture is what was uploaded; its header is checked before anything decodes it.
Question and picture come in one event, which the page sends when the upload is complete.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from aimv2_vlm.config import UserError
from aimv2_vlm.data.tiling import Tiling
from aimv2_vlm.data.transforms import MAX_BYTES, MAX_PIXELS
from aimv2_vlm.page import text as harmless
from aimv2_vlm.serve.chat import Chat, Session, describe

SHOWN_SIDE = 1024  # pixels of the longer side of the picture in the page
MAX_SESSIONS = 64  # conversations kept, and questions waiting; the least recent conversation is forgotten
MAX_CHARACTERS = 20_000  # of one question
CLEAN_EVERY = 3600  # seconds after which uploaded files are deleted
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LIMITS = f"up to {MAX_PIXELS // 1_000_000} megapixels and {MAX_BYTES // 1_000_000} MB"
TILE_COLOUR, OVERVIEW_COLOUR = (255, 96, 0), (0, 122, 255)

CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.25rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.note { color: var(--body-text-color); opacity: .8; font-size: var(--text-sm); min-height: 1.5em; }
.note:has(b.wrong) { opacity: 1; }
.note b.wrong { color: var(--error-text-color); font-weight: 600; }
"""

# What the page and Gradio's own client need. Everything else Gradio serves is closed: fetching addresses (proxy=,
# file=http…), monitoring, server functions of components, editors.
OPEN_PATHS = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.*"
    r"|/gradio_api/(info|app_id|heartbeat/\w+|startup-events|theme\.css|upload|upload_progress|run/\w+|queue/(join|data)|cancel|reset)/?"
    r"|/gradio_api/file=/.*"
)
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'self'; object-src 'none'"
)


class Gate:
    """ASGI middleware: only OPEN_PATHS are served, and browsers are told to load nothing from elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not OPEN_PATHS.fullmatch(scope["path"]):
            from starlette.responses import PlainTextResponse

            return await PlainTextResponse("not served here", status_code=404)(scope, receive, send)

        async def guarded(message: dict) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self.app(scope, receive, guarded)


def serve(
    model_path: str, image: str | None = None, max_new_tokens: int = 256, host: str | None = None, port: int | None = None
) -> int:
    """Serve the page until interrupted, at this machine's loopback unless told otherwise. Raises UserError: extra not installed, no
    assistant, port taken."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError('chat --web needs Gradio: pip install "aimv2-vlm[web]"') from None
    if port is not None and not 0 < port < 65536:
        raise UserError(f"--port {port}: ports are 1 to 65535")
    host = host or LOOPBACK[0]
    check_address(host, port)  # before a large model is loaded
    model, first = Chat.open(model_path, max_new_tokens), Session()
    picture = drawn(model, model.show(first, Path(image).expanduser())) if image else None
    page, address = launch(model, title_of(model_path), first, picture, host, port)
    print(f"chat: {address} (Ctrl-C ends)", flush=True)
    if host not in LOOPBACK:
        print(f"warning: whoever reaches {host} can use it; there is no password", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    page.close(verbose=False)
    return 0


def title_of(model_path: str) -> str:
    """The run's name: a folder called `final` says nothing."""
    parts = [part for part in Path(model_path).parts if part not in (".", "..", "/")]
    return next((part for part in reversed(parts) if part != "final"), "assistant")


def launch(
    model: Chat, title: str, first: Session, picture: Image.Image | None = None, host: str = LOOPBACK[0], port: int | None = None
) -> tuple[Any, str]:
    """(page, address) of a running server; every visitor's conversation begins with `first`'s picture, `picture` as drawn."""
    import gradio as gr
    from starlette.middleware import Middleware

    page = build_page(model, title, first, picture)
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, prevent_thread_lock=True, quiet=True,
            max_file_size=MAX_BYTES, state_session_capacity=MAX_SESSIONS, footer_links=[], run_history=False,
            enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False, show_error=True, css=CSS,
            app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None, "middleware": [Middleware(Gate)]},
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )  # fmt: skip
    except OSError:
        raise _cannot_serve(host, port) from None
    return page, address


def check_address(host: str, port: int | None) -> None:
    """Raises UserError where nothing can be served at `host` (port None: at none of its ports), or `port` is taken there."""
    try:
        family, *_, place = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(place[:2], family=family).close()
    except OSError:
        raise _cannot_serve(host, port) from None


def _cannot_serve(host: str, port: int | None) -> UserError:
    where = f"--host {host}" if port is None else f"--host {host} --port {port}"
    return UserError(f"chat: {where}: cannot serve there; the port is taken or the address is not this machine's")


def build_page(model: Chat, title: str, first: Session, picture: Image.Image | None = None) -> Any:
    """The page as a `gradio.Blocks`."""
    import gradio as gr

    class Page(gr.Blocks):
        async def preprocess_data(self, block_fn: Any, inputs: list, *args: Any, **kwargs: Any) -> Any:
            # Gradio downloads what a client names by URL, in the input of any component, before that component sees it.
            if names_address(inputs):
                raise gr.Error("refused: a picture is an uploaded file, addresses are not fetched", print_exception=False)
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)

    with Page(title=f"{title} · aimv2-vlm", analytics_enabled=False, fill_width=True, delete_cache=(CLEAN_EVERY, CLEAN_EVERY)) as page:
        state = gr.State(None)
        gr.HTML(f"<h1>{harmless(title)}</h1>", elem_id="title")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                shown = gr.Image(
                    label="What the model sees", show_label=False, interactive=False, height=470, buttons=["fullscreen"], format="webp", elem_id="picture"
                )
                about = gr.HTML(elem_classes="note", elem_id="about")
            with gr.Column(scale=6, min_width=320):
                # Plain text: an answer that is Markdown could make the visitor's browser load pictures from elsewhere.
                talk = gr.Chatbot(
                    label="Conversation", height=400, render_markdown=False, buttons=[], feedback_options=None, elem_id="talk"
                )
                box = gr.MultimodalTextbox(
                    show_label=False, placeholder="Ask a question; the clip adds a picture", file_count="single", file_types=["image"], sources=["upload"],
                    max_plain_text_length=MAX_CHARACTERS, submit_btn=True, stop_btn=False, autofocus=True, elem_id="box",
                )  # fmt: skip
                note = gr.HTML(elem_classes="note", elem_id="note")
                with gr.Row():
                    anew = gr.Button("New conversation", size="sm", elem_id="anew")
                    bare = gr.Button("Remove picture", size="sm", elem_id="bare")
        everything = [shown, about, talk, box, note, state]
        # preprocess=False: Gradio would judge files itself, in other words. One question at a time; the others see their place.
        asked = box.submit(
            partial(ask, model, first), [box, state], everything, preprocess=False, api_name="ask",
            concurrency_limit=1, concurrency_id="model", show_progress="minimal", show_progress_on=[note],
        )  # fmt: skip
        box.stop(stop_answer, state, None, queue=False, show_progress="hidden", api_name="stop")
        direct = dict(queue=False, show_progress="hidden")
        page.load(partial(greet, model, first, picture), None, everything, api_name=False, **direct)
        for button, keep, name in ((anew, True, "new"), (bare, False, "remove_picture")):
            button.click(partial(begin_anew, model, first, keep), state, everything, cancels=[asked], api_name=name, **direct)
        talk.clear(partial(begin_anew, model, first, True), state, everything, cancels=[asked], api_name=False, **direct)
    page.queue(max_size=MAX_SESSIONS)
    return page


# ------------------------------------------------------------------------------- what the page's events do
# Outputs: picture, line about it, conversation, box, line about the answer, session.


def greet(model: Chat, first: Session, picture: Image.Image | None) -> tuple:
    """A new visitor's conversation."""
    return picture, picture_note(model, first), [], idle_box(""), "", Session(first.shown)


def ask(model: Chat, first: Session, message: Any, session: Session | None) -> Iterator[tuple]:
    """The conversation as the answer grows. message: {"text": …, "files": [Gradio's dict of an uploaded file]}.

    A file is shown to the model first and begins the conversation anew; what is refused leaves everything as it was.
    """
    from gradio import skip

    same = skip()
    session = session or Session(first.shown)
    message = message if isinstance(message, dict) else {}
    question, files = str(message.get("text") or "").strip(), message.get("files") or []
    picture = about = same
    try:
        if len(question) > MAX_CHARACTERS:
            raise UserError(f"a question of {len(question)} characters; the longest is {MAX_CHARACTERS}")
        if len(files) > 1:
            raise UserError("one picture at a time")
        if files:
            name = str(files[0].get("orig_name") or "picture")
            picture = drawn(model, model.show(session, files[0]["path"], name))
            about = picture_note(model, session)
        if not question:
            if not files:
                raise UserError("type a question first")
            yield picture, about, [], idle_box(""), "ask about it", session
            return
        said = [*messages(session), {"role": "user", "content": question}, {"role": "assistant", "content": "…"}]
        yield picture, about, said, busy_box(), "", session
        answer = ""
        for piece in model.ask(session, question):
            answer += piece
            if answer.strip():
                said[-1] = {"role": "assistant", "content": answer.strip()}
                yield same, same, said, same, "", session
    except UserError as error:
        yield picture, about, messages(session), idle_box(question), wrong(error), session
        return
    if session.reply is None:  # begun anew meanwhile
        return
    said[-1] = {"role": "assistant", "content": session.reply.text or "(an empty answer)"}
    yield same, same, said, idle_box(), harmless(session.reply), session


def stop_answer(session: Session | None) -> None:
    if session is not None:
        session.stop.set()


def begin_anew(model: Chat, first: Session, keep_picture: bool, session: Session | None) -> tuple:
    """An empty conversation, with or without the picture."""
    from gradio import skip

    session = session or Session(first.shown)
    session.begin(session.shown if keep_picture else None)
    return skip() if keep_picture else None, picture_note(model, session), [], idle_box(), "", session


def idle_box(text: str | None = None) -> dict:
    """The question box ready to send, with this text and no file, or with what it holds (None)."""
    from gradio import update

    return update(submit_btn=True, stop_btn=False, **({} if text is None else {"value": {"text": text, "files": []}}))


def busy_box() -> dict:
    """The question box empty, with a stop button in the place of the send button."""
    from gradio import update

    return update(value={"text": "", "files": []}, submit_btn=False, stop_btn=True)


def messages(session: Session) -> list[dict]:
    return [{"role": role, "content": said} for role, said in session.turns]


def wrong(reason: Any) -> str:
    return f'<b class="wrong">{harmless(reason)}</b>'


def picture_note(model: Chat, session: Session) -> str:
    if session.shown is None:
        return f"no picture yet ({LIMITS})"
    framed = model.grid_of(session.shown) is not None
    return harmless(describe(model, session.shown)) + "; orange: tiles, blue: overview" * framed


def drawn(model: Chat, picture: Image.Image) -> Image.Image:
    """The picture with the frame of every view the encoder sees."""
    mean = getattr(model.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
    return draw_views(picture, model.views, tuple(int(255 * part) for part in mean))


def draw_views(picture: Image.Image, tiling: Tiling | None, padding: tuple[int, int, int]) -> Image.Image:
    """A copy, SHOWN_SIDE pixels long, with the views' frames; it grows by the `padding` that a view reaches into."""
    views = tiling.views(picture.height, picture.width) if tiling is not None else []
    boxes = [(0, 0, picture.width, picture.height), *(view.box for view in views)]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    scale = SHOWN_SIDE / max(right - left, bottom - top)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    canvas = Image.new("RGB", (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))), padding)
    canvas.paste(picture.resize(size), (round(-left * scale), round(-top * scale)))
    pen = ImageDraw.Draw(canvas)
    for view in sorted(views, key=lambda view: view.name == "overview"):  # drawn last: it lies over the outer edges
        x0, y0, x1, y1 = (round((edge - start) * scale) for edge, start in zip(view.box, (left, top, left, top), strict=True))
        colour = OVERVIEW_COLOUR if view.name == "overview" else TILE_COLOUR
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=4)
    return canvas


def names_address(value: Any) -> bool:
    """Whether a client's input holds a file that is to be fetched or is written into the request instead of uploaded."""
    if isinstance(value, dict):
        path, url = value.get("path"), value.get("url")
        remote = isinstance(path, str) and "://" in path or isinstance(url, str) and url.startswith("data:")
        return remote or any(names_address(part) for part in value.values())
    return isinstance(value, (list, tuple)) and any(names_address(part) for part in value)
