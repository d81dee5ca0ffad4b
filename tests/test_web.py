"""The page: what a visitor gets, what is refused and in which words, and that neither side asks anybody else for anything."""

from __future__ import annotations

import asyncio
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from test_chat import make_assistant, make_bomb, make_picture

pytest.importorskip("gradio", reason="the extra [web] is not installed")

import httpx
import numpy as np
from gradio_client import Client, handle_file
from gradio_client.utils import Status
from PIL import Image

from aimv2_vlm.config import UserError
from aimv2_vlm.data.tiling import Tiling
from aimv2_vlm.data.transforms import MAX_BYTES
from aimv2_vlm.serve import web
from aimv2_vlm.serve.chat import Chat, Session

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Asked(list):
    """Every name that was looked up and every address that was connected to, in this process."""

    def elsewhere(self) -> list[str]:
        return [host for host in self if host not in LOOPBACK]


@pytest.fixture(scope="module")
def asked():
    known, lookup, connect = Asked(), socket.getaddrinfo, socket.socket.connect

    def looking_up(host, *args, **kwargs):
        known.append(host.decode() if isinstance(host, bytes) else str(host))
        return lookup(host, *args, **kwargs)

    def connecting(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            known.append(address[0])
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", looking_up)
        patch.setattr(socket.socket, "connect", connecting)
        yield known


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    make_assistant(folder, "2x2")
    make_picture(folder / "square.png")
    make_picture(folder / "wide.png", 96, 40, seed=3)
    make_bomb(folder / "bomb.png")
    (folder / "text.png").write_text("no picture", encoding="utf-8")
    with (folder / "large.png").open("wb") as large:
        large.truncate(MAX_BYTES + 1)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> Chat:
    return Chat.open(folder / "final", max_new_tokens=24)


@pytest.fixture(scope="module")
def address(model, asked):
    page, address = web.launch(model, "made <b>here", Session())
    yield address.rstrip("/")
    page.close(verbose=False)


@pytest.fixture(scope="module")
def both(address):
    return [Client(address, verbose=False, analytics_enabled=False, download_files=False) for _ in range(2)]


@pytest.fixture
def clients(both):
    """Two visitors at the beginning of their conversations."""
    for client in both:
        client.predict(api_name="/remove_picture")
    return both


@pytest.fixture
def client(clients):
    return clients[0]


@pytest.fixture(scope="module")
def plain(address):
    """HTTP without Gradio's client, which would refuse to send some of what must be refused."""
    with httpx.Client(base_url=address, timeout=30) as plain:
        yield plain


def ask(client: Client, question: str, *files: Path) -> tuple[list, str]:
    """(conversation as (role, text), the line below it) when the answer is complete."""
    _, _, said, _, note = client.predict({"text": question, "files": [handle_file(str(file)) for file in files]}, api_name="/ask")
    return [(turn["role"], "".join(part["text"] for part in turn["content"])) for turn in said], note


def alone(model: Chat, picture: Path | None, *questions: str) -> list[tuple[str, str]]:
    session = Session()
    if picture:
        model.show(session, picture)
    for question in questions:
        list(model.ask(session, question))
    return list(session.turns)


# ------------------------------------------------------------------------------------------------ over HTTP


def test_the_answer_streams_and_the_second_question_knows_the_first(client, model, folder):
    job = client.submit({"text": "What is shown?", "files": [handle_file(str(folder / "wide.png"))]}, api_name="/ask")
    *_, note = job.result()
    stages = job.outputs()
    assert len({str(said) for _, _, said, _, _ in stages}) > 3, "the answer came in one piece"
    assert "96 x 40 pixels, 2x2 tiles" in stages[0][1] and stages[0][0]
    assert re.search(r"24 tokens of picture, \d+ of text, \d+ of answer, \d+\.\d s", note)
    turns, _ = ask(client, "Which color?")
    assert turns == alone(model, folder / "wide.png", "What is shown?", "Which color?") and all(text for _, text in turns)


def test_two_visitors_and_their_conversations_stay_apart(clients, model, folder):
    ask(clients[0], "What is shown?", folder / "square.png")
    assert ask(clients[1], "Which color?")[0] == alone(model, None, "Which color?")
    assert ask(clients[0], "Which color?")[0] == alone(model, folder / "square.png", "What is shown?", "Which color?")


def test_one_answer_at_a_time_and_who_waits_is_told_so(clients, model, monkeypatch):
    go, running, most = threading.Event(), [], []
    generate = model.model.generate

    def slowly(*args, **kwargs):
        running.append(1)
        most.append(len(running))
        go.wait(30)
        try:
            return generate(*args, **kwargs)
        finally:
            running.pop()

    monkeypatch.setattr(model.model, "generate", slowly)
    jobs = [clients[0].submit({"text": "What is shown?", "files": []}, api_name="/ask")]
    until(lambda: most)
    jobs.append(clients[1].submit({"text": "Which color?", "files": []}, api_name="/ask"))
    until(lambda: jobs[1].status().code == Status.IN_QUEUE and jobs[1].status().rank == 0)
    go.set()
    assert all(job.result(30)[2] for job in jobs) and most == [1, 1]


def test_stop_ends_the_answer_and_new_forgets_it(client, model, monkeypatch):
    monkeypatch.setattr(model, "max_new_tokens", 3500)
    job = client.submit({"text": "What is shown?", "files": []}, api_name="/ask")
    until(lambda: len(job.outputs()) > 3)
    client.predict(api_name="/stop")
    *_, said, _, note = job.result(60)
    assert int(re.search(r"(\d+) of answer", note)[1]) < 3000 and len(said) == 2
    monkeypatch.setattr(model, "max_new_tokens", 24)
    assert len(ask(client, "More?")[0]) == 4
    client.predict(api_name="/new")
    assert ask(client, "Which color?")[0] == alone(model, None, "Which color?")


def test_pictures_over_the_limits_and_files_that_are_none_are_refused_in_words(client, plain, model, folder):
    turns, _ = ask(client, "What is shown?", folder / "square.png")
    for name, reason in {"bomb.png": "60000 x 60000 pixels, over the limit of 64000000", "text.png": "not a picture in a known format"}.items():
        kept, note = ask(client, "And this?", folder / name)
        assert kept == turns and f"{name}: no picture to show: {reason}" in note and "\n" not in note
    refused = plain.post("gradio_api/upload", files={"files": ("large.png", (folder / "large.png").read_bytes())})
    assert refused.status_code == 413 and f"maximum allowed size of {MAX_BYTES} bytes" in refused.text
    assert "one picture at a time" in ask(client, "Both?", folder / "square.png", folder / "wide.png")[1]
    assert "type a question first" in ask(client, "  ")[1]
    assert "the longest is 20000" in ask(client, "a" * 20_001)[1]
    assert ask(client, "Which color?")[0] == alone(model, folder / "square.png", "What is shown?", "Which color?")


def until(holds, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def outcome(plain: httpx.Client, message: dict) -> dict:
    """The queue's last word on a question."""
    number = next(part["id"] for part in plain.get("config").json()["dependencies"] if part["api_name"] == "ask")
    session = {"session_hash": f"s{time.monotonic_ns()}"}
    sent = plain.post("gradio_api/queue/join", json={"data": [message, None], "fn_index": number, **session})
    assert sent.status_code == 200, sent.text
    with plain.stream("GET", "gradio_api/queue/data", params=session) as stream:
        events = (json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:"))
        return next(event for event in events if event["msg"] == "process_completed")


@pytest.fixture
def bait(folder):
    """A server with a good picture; what it was asked for."""
    hits = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write((folder / "square.png").read_bytes())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", hits
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("marked", [True, False])
def test_an_address_instead_of_an_upload_is_not_fetched(plain, bait, asked, marked):
    url, hits = bait
    for path in (f"{url}/a.png", "https://pictures.example/a.png"):
        for names in ((path, None), (path, path), ("a.png", path), ("a.png", "data:image/png;base64,AA")):
            file = {key: name for key, name in zip(("path", "url"), names, strict=True) if name}
            file |= {"orig_name": "a.png"} | ({"meta": {"_type": "gradio.FileData"}} if marked else {})
            assert not outcome(plain, {"text": "What is shown?", "files": [file]})["success"], file
    assert not hits and not asked.elsewhere()


def test_the_server_fetches_no_address_for_anybody(plain, bait, asked):
    url, hits = bait
    for way in ("gradio_api/file=", "gradio_api/proxy=", "file=", "proxy=", "gradio_api/file/", "gradio_api/FILE="):
        for target in (f"{url}/a.png", "https://pictures.example/a.png", "https:/pictures.example/a.png", "//pictures.example/a.png"):
            assert plain.get(f"/{way}{target}").status_code in (403, 404), way + target
    for closed in ("docs", "redoc", "openapi.json", "gradio_api/openapi.json", "monitoring", "monitoring/summary", "gradio_api/deep_link",
                   "gradio_api/runs", "gradio_api/vibe-code", "gradio_api/queue/status", "login_check"):  # fmt: skip
        assert plain.get(f"/{closed}").status_code == 404, closed
    assert plain.post("/gradio_api/component_server", json={}).status_code == 404
    assert not hits and not asked.elsewhere()


def test_no_file_of_the_machine_can_be_read(plain, folder):
    secret = folder / "final" / "config.json"
    assert secret.is_file()
    for path in (secret, "/etc/passwd", f"/tmp/../{secret}", f"/gradio_api/..{secret}", "/proc/self/environ", os.devnull):
        for way in ("gradio_api/file=", "gradio_api/file%3D", "static/", "assets/", "static/..", "assets/../../..", "static/%2e%2e%2f%2e%2e"):
            raw = plain.get(f"/{way}{path}")
            assert raw.status_code in (403, 404), (way, path)
    for marked in ({"meta": {"_type": "gradio.FileData"}}, {}):
        for path in (str(folder / "square.png"), "/etc/passwd", "../../../etc/passwd"):
            last = outcome(plain, {"text": "What is shown?", "files": [{"path": path, "orig_name": "a.png", **marked}]})
            assert not last["success"] and "root:" not in str(last), last
    name = "../../../../escaped.png"
    (stored,) = plain.post("/gradio_api/upload", files={"files": (name, (folder / "square.png").read_bytes())}).json()
    assert Path(stored).name == "escaped.png" and ".." not in stored and "gradio" in stored


def test_the_page_names_nothing_from_elsewhere_and_forbids_it(plain, asked):
    page = plain.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "connect-src 'self'" in policy and not re.search(r"https?:|\*", policy)
    assert "made &lt;b&gt;here" in page.text.replace("\\u0026", "&") and "<b>here" not in page.text
    config = plain.get("/config").json()
    assert config["analytics_enabled"] is False and not config.get("share_url")
    assert not asked.elsewhere()


def test_a_port_that_is_taken_is_one_line(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: cannot serve there; the port is taken") as refused:
            web.launch(model, "again", Session(), port=port)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="ports are 1 to 65535"):
        web.serve("nowhere", port=70_000)


@pytest.mark.parametrize("host", ["203.0.113.1", "nowhere.invalid"])
def test_an_address_that_is_not_this_machines_is_refused_before_the_model_is_loaded(host):
    with pytest.raises(UserError, match=f"--host {host}: cannot serve there"):
        web.serve("no model", host=host)


def test_frames_lie_where_the_views_do():
    wide = Image.fromarray(np.full((100, 300, 3), 200, dtype=np.uint8))
    tiling = Tiling.parse("2x2", tile_size=28)
    shown = np.asarray(web.draw_views(wide, tiling, (9, 9, 9)))
    assert shown.shape == (1024, 1024, 3), "a padded picture is shown with its padding"
    assert (shown[100, 200] == 9).all() and (shown[512 - 60, 200] == 200).all()
    assert (shown[1, 300] == web.OVERVIEW_COLOUR).all() and (shown[300, 511] == web.TILE_COLOUR).all() and (shown[511, 300] == web.TILE_COLOUR).all()
    whole = np.asarray(web.draw_views(wide, Tiling.parse("1x1", tile_size=28, pad_square=False), (9, 9, 9)))
    assert whole.shape == (341, 1024, 3) and (whole[170, 512] == 200).all()
    assert web.draw_views(wide, None, (9, 9, 9)).size == (1024, 341)


# ------------------------------------------------------------------------------------------------ in a browser


class Browser:
    """Headless Chromium over its DevTools protocol: just what the test below needs."""

    def __init__(self, profile: Path) -> None:
        self.requests: list[str] = []
        self.refused: list[str] = []
        self.profile, self.replies, self.numbers = profile, {}, itertools.count(1)

    async def __aenter__(self) -> Browser:
        import aiohttp

        self.process = subprocess.Popen(
            [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,860",
             f"--user-data-dir={self.profile}", "--remote-debugging-port=0", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        self.http = aiohttp.ClientSession()
        port_file = self.profile / "DevToolsActivePort"
        await self.poll(lambda: port_file.exists() and port_file.read_text().count("\n") == 1)
        port = port_file.read_text().split()[0]
        async with self.http.get(f"http://127.0.0.1:{port}/json") as reply:
            tab = next(tab for tab in await reply.json() if tab["type"] == "page")
        self.socket = await self.http.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        self.reader = asyncio.create_task(self.read())
        for domain in ("Page", "Network", "DOM", "Log"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *_) -> None:
        self.reader.cancel()
        await self.http.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    async def read(self) -> None:
        async for message in self.socket:
            event = json.loads(message.data)
            if event.get("id") in self.replies:
                self.replies.pop(event["id"]).set_result(event)
            elif event.get("method") == "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            elif event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                self.refused.append(event["params"]["entry"]["text"])

    async def call(self, method: str, **params) -> dict:
        number = next(self.numbers)
        self.replies[number] = asyncio.get_running_loop().create_future()
        await self.socket.send_str(json.dumps({"id": number, "method": method, "params": params}))
        event = await asyncio.wait_for(self.replies[number], 30)
        assert "error" not in event, event
        return event["result"]

    async def see(self, expression: str):
        """The value of a JavaScript expression."""
        return (await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True))["result"].get("value")

    async def poll(self, holds, seconds: float = 40):
        end = time.monotonic() + seconds
        while True:
            value = holds()
            value = await value if asyncio.iscoroutine(value) else value
            if value or time.monotonic() > end:
                assert value, "waited in vain"
                return value
            await asyncio.sleep(0.03)

    async def wait(self, expression: str, seconds: float = 40):
        try:
            return await self.poll(lambda: self.see(expression), seconds)
        except AssertionError:
            raise AssertionError(f"{expression}: {await self.see('document.body.innerText')}") from None

    async def upload(self, file: Path) -> None:
        await self.wait("!!document.querySelector('#box input[type=file]')")
        root = (await self.call("DOM.getDocument", depth=-1))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector="#box input[type=file]"))["nodeId"]
        await self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    async def ask(self, question: str) -> None:
        """Type and send at once, whether an upload is complete or not."""
        await self.see("document.querySelector('#box textarea').focus(), document.querySelector('#box textarea').select()")
        await self.call("Input.insertText", text=question)
        await self.see("document.querySelector('#box [data-testid=submit-button]').click()")


SAID = "[...document.querySelectorAll('#talk [data-testid=user], #talk [data-testid=bot]')].map(m => m.innerText.trim())"
NOTE = "document.querySelector('#note').innerText"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_visitor_uploads_asks_reads_and_is_told_what_is_refused(address, model, folder, tmp_path, monkeypatch):
    generate = model.model.generate

    def unhurried(*args, stopping_criteria, **kwargs):  # so that the growing answer can be seen
        stopping_criteria.append(lambda ids, scores, **_: time.sleep(0.05) or ids.new_zeros(len(ids)).bool())
        return generate(*args, stopping_criteria=stopping_criteria, **kwargs)

    monkeypatch.setattr(model.model, "generate", unhurried)

    async def visit() -> None:
        async with Browser(tmp_path / "profile") as browser:
            await browser.call("Page.navigate", url=address)
            await browser.wait("document.querySelector('#about')?.innerText.includes('no picture yet')")
            await browser.upload(folder / "wide.png")
            await browser.ask("What is shown?")  # at once: the page waits for the upload itself
            stages, end = [], time.monotonic() + 90
            while (said := await browser.see(SAID)) is None or not re.search("of answer", await browser.see(NOTE) or ""):
                stages.append(tuple(said or ()))
                await asyncio.sleep(0.03)
                assert time.monotonic() < end, (stages[-3:], await browser.see(NOTE), await browser.see("document.querySelector('#box textarea').value"))
            assert len({stage for stage in stages if len(stage) == 2}) > 2, f"no growing answer was seen: {set(stages)}"
            expected = alone(model, folder / "wide.png", "What is shown?", "Which color?")
            assert [" ".join(text.split()) for text in await browser.see(SAID)] == [" ".join(text.split()) for _, text in expected[:2]]
            about = await browser.see("document.querySelector('#about').innerText")
            assert "96 x 40 pixels, 2x2 tiles, 24 tokens" in about
            size = await browser.wait("(i => i && i.naturalWidth && [i.naturalWidth, i.naturalHeight])(document.querySelector('#picture img'))")
            assert size == [1024, 1024]
            frame = await browser.see("""(async () => { const i = document.querySelector('#picture img'), c = document.createElement('canvas');
                c.width = c.height = 1024; const x = c.getContext('2d'); x.drawImage(i, 0, 0);
                return [...x.getImageData(300, 512, 1, 1).data] })()""")
            assert np.abs(np.array(frame[:3]) - web.TILE_COLOUR).max() < 60, "the tiles' frames are seen"

            await browser.ask("Which color?")
            await browser.wait(f"{SAID}.length == 4 && /of answer/.test({NOTE})")
            assert [" ".join(text.split()) for text in await browser.see(SAID)] == [" ".join(text.split()) for _, text in expected]

            for name, reason in {"bomb.png": "60000 x 60000 pixels, over the limit", "text.png": "not a picture in a known format"}.items():
                await browser.upload(folder / name)
                await browser.ask("And this?")
                await browser.wait(f"/{re.escape(name)}: no picture to show: {reason}/.test({NOTE})")
                assert len(await browser.see(SAID)) == 4 and await browser.see("document.querySelector('#box textarea').value") == "And this?"
            await browser.upload(folder / "large.png")
            await browser.wait("/maximum|exceeds|too large/i.test(document.body.innerText)")

            await browser.see("document.querySelector('#anew').click()")
            await browser.wait(f"{SAID}.length == 0")
            assert await browser.see("!!document.querySelector('#picture img')")
            await browser.see("document.querySelector('#bare').click()")
            await browser.wait("document.querySelector('#about').innerText.includes('no picture yet')")
            own = (address, "data:", "blob:", "about:", "chrome:")
            assert not [url for url in browser.requests if not url.startswith(own)]

    asyncio.run(asyncio.wait_for(visit(), 200))
