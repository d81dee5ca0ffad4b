"""R7: shards, files and names that want to run or to write something, and a watch over what really happens.

    python benchmarks/reliability/hostile.py FOLDER [--control]

Makes a hostile corpus in FOLDER/corpus, runs `data check`, `data pack`, `pretrain` and the conversation reader over it in
this process under `sys.addaudithook`, and prints one JSON object: what each command said, and every execution, network
connection, unpickling and write outside FOLDER/out and the places of the commands' own indexes. --control opens the same
corpus the way careless readers do: the watch must see that. Run it in a process of its own: a hook stays for good.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reliability.corpus import Payload, caption_of, picture  # noqa: E402
from benchmarks.reliability.corruption import TINY  # noqa: E402

# Events of what nobody may do on behalf of data (https://docs.python.org/3/library/audit_events.html).
EXECUTION = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn", "pickle.find_class",
             "ctypes.dlopen", "socket.connect", "socket.getaddrinfo", "urllib.Request", "ftplib.connect")
WRITES = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime",
          "shutil.rmtree", "shutil.copyfile", "shutil.move", "shutil.unpack_archive")


# -------------------------------------------------------------------------------------------------------------- corpus


def good_members(key: str, number: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", picture(number)), (f"{key}.txt", caption_of(number).encode())]


def npy_with_objects(payload: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def write_corpus(folder: Path, canary: Path) -> None:
    """Everything that wants to make a file below `canary` when somebody is careless."""

    def payload(name: str) -> bytes:
        return pickle.dumps(Payload(str(canary / name)))

    shards = folder / "shards"
    shards.mkdir(parents=True)
    shell = f"touch {canary / 'shell'}"
    members: list[tuple[str, bytes] | tarfile.TarInfo] = []
    for number in range(40):
        members += good_members(f"good{number:02d}", number)
    hostile = {
        "pyd": payload("pyd"), "pth": zipped({"archive/data.pkl": payload("pth"), "archive/version": b"3"}), "pt": payload("pt"),
        "pkl": payload("pkl"), "pickle": payload("pickle"), "PKL": payload("upper"), "npy": npy_with_objects(payload("npy")),
        "npz": zipped({"a.npy": npy_with_objects(payload("npz"))}), "joblib": payload("joblib"), "dill": payload("dill"),
        "py": f"import os; os.mkdir({str(canary / 'py')!r})".encode(), "so": b"\x7fELF", "x.pkl": payload("double"),
    }
    for number, (extension, data) in enumerate(hostile.items()):
        members += [*good_members(f"run{number:02d}", 100 + number), (f"run{number:02d}.{extension}", data)]
    members += [("pickle-as-picture.jpg", payload("jpg")), ("pickle-as-picture.txt", b"x"), ("pickle-as-text.jpg", picture(1)),
                ("pickle-as-text.txt", payload("txt")), ("pickle-as-json.jpg", picture(1)), ("pickle-as-json.json", payload("json"))]
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(" + str(canary / "eps").encode() + b") (w) file closefile\n"
    members += [("eps.jpg", postscript), ("eps.txt", b"x")]
    paths = ("../escaped", "../../escaped", str(canary / "absolute"), "a/../../escaped", "..", "/", "~/escaped", "$(touch x)", "`touch x`; rm")
    for number, name in enumerate(paths):
        members += good_members(name, 200 + number)
    for kind, name, target in (
        (tarfile.SYMTYPE, "link.jpg", "/etc/passwd"), (tarfile.SYMTYPE, "out", str(canary)), (tarfile.LNKTYPE, "hard.jpg", "../../escaped"),
        (tarfile.CHRTYPE, "device.jpg", ""), (tarfile.BLKTYPE, "disk.jpg", ""), (tarfile.FIFOTYPE, "pipe.jpg", ""), (tarfile.DIRTYPE, "../made", ""),
        (tarfile.DIRTYPE, str(canary / "made"), ""),
    ):
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.devmajor, info.devminor = kind, target, 1, 5
        members.append(info)
    members += good_members("out/through-the-link", 300)
    with tarfile.open(shards / "00000.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))

    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(40):
        (pictures / f"good{number:02d}.jpg").write_bytes(picture(number))
        (pictures / f"good{number:02d}.txt").write_text(caption_of(number))
    (pictures / "pickle.jpg").write_bytes(payload("packed"))
    (pictures / "pickle.txt").write_text("x")
    (pictures / "eps.jpg").write_bytes(postscript)
    (pictures / "eps.txt").write_text("x")
    os.mkfifo(pictures / "pipe.jpg")  # whoever opens it waits for ever
    (pictures / "pipe.txt").write_text("x")
    (pictures / "zero.jpg").symlink_to("/dev/zero")
    (pictures / "zero.txt").write_text("x")
    names = ["pickle.jpg", "pipe.jpg", "zero.jpg", "../shards/00000.tar", str(canary / "x.jpg"), f"pipe:{shell}", f"|{shell}", f"$({shell})",
             "file:///etc/passwd", "http://127.0.0.1:9/x.jpg", "simplecache::http://127.0.0.1:9/x", "/dev/zero", "good00.jpg\0.png", "-rf", "%n%s"]
    good = {"image": "good00.jpg", "caption": "a good one"}
    rows: list[Any] = [good, *({"image": name, "caption": "x"} for name in names),
                       good | {"key": "../../escaped"}, good | {"ext": "pkl", "__reduce__": ["os.system", shell], "../x": {"a": "b"}}]
    (pictures / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))

    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    lines = [{"id": name, "image": name, "conversations": turns} for name in ["good00.jpg", *names]]
    lines += [{"id": "py", "image": "good00.jpg", "py/object/apply": ["os.system", shell], "conversations": turns}]
    (folder / "rows").mkdir()
    (folder / "rows" / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "rows" / "rows.json").write_text(json.dumps(lines))
    (folder / "rows" / "rows.jsonl.rows").write_bytes(payload("rows"))
    (folder / "rows" / "pickle.json").write_bytes(payload("pickle-json"))
    (folder / "pickle.model").write_bytes(payload("tokenizer"))
    (folder / "tar").mkdir()
    (folder / "tar" / "pickle.tar").write_bytes(payload("tar"))
    encoder = folder / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "aimv2_vision_model", "auto_map": {"AutoModel": "code.Model"}}))
    (encoder / "code.py").write_text(f"import os; os.mkdir({str(canary / 'code')!r})")
    (encoder / "pytorch_model.bin").write_bytes(payload("encoder"))
    (folder / "python.yaml").write_text(f"seed: !!python/object/apply:os.system ['{shell}']\n")


# --------------------------------------------------------------------------------------------------------------- watch


class Watch:
    """What happens from `start` on, as far as it is execution or a write outside the folders given."""

    def __init__(self, allowed: list[Path], indexed: Path):
        self.allowed = [os.path.realpath(folder) for folder in allowed]
        self.indexed = os.path.realpath(indexed)  # below it only indexes may be written
        self.on, self.seen, self.events = False, [], 0
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        self.on = False  # what is looked up here is not of interest
        try:
            self.events += 1
            if event.startswith(EXECUTION) and not self._harmless(event, arguments):
                self.seen.append(f"{event} {arguments!r:.200}")
            elif event == "open" and self._for_writing(*arguments) and not self._inside(arguments[0]):
                self.seen.append(f"write {arguments[0]!r:.200}")
            elif event == "os.mkdir" and os.path.isdir(arguments[0]):
                pass  # "make it if it is not there"
            elif event.startswith(WRITES) and not all(map(self._inside, self._paths(event, arguments))):
                self.seen.append(f"{event} {arguments!r:.200}")
        finally:
            self.on = True

    @staticmethod
    def _for_writing(path: Any, mode: Any, flags: Any) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)) if isinstance(flags, int) else "r" != str(mode)[:1]

    def _harmless(self, event: str, arguments: tuple) -> bool:
        if event == "ctypes.dlopen":  # libraries of the system are looked for by name; one of the corpus would have a path
            return os.sep not in str(arguments[0])
        # The run directory notes the commit it was started from.
        return event == "subprocess.Popen" and list(arguments[1])[:2] == ["git", "-C"] and list(arguments[1])[3:] == ["rev-parse", "HEAD"]

    @staticmethod
    def _paths(event: str, arguments: tuple) -> list[Any]:
        return list(arguments[:2]) if event in ("os.rename", "os.link", "os.symlink", "shutil.copyfile", "shutil.move") else [arguments[0]]

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):  # a descriptor: its opening was judged
            return True
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (TypeError, ValueError):
            return False
        if os.path.dirname(real).startswith(self.indexed + os.sep) and real.endswith((".index.json", ".manifest", ".rows", ".tmp")):
            return True
        return real == os.devnull or any(real == folder or real.startswith(folder + os.sep) for folder in self.allowed)


def command(*words: object) -> str:
    """`aimv2-vlm` in this process: its exit status and last line."""
    from aimv2_vlm.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        status = main([str(word) for word in words])
    lines = said.getvalue().strip().splitlines()
    return f"{status}: {lines[-1] if lines else ''}"


def conversations(path: Path, images: Path) -> str:
    """Every row and every picture as the tuning run takes them."""
    from aimv2_vlm.config import UserError
    from aimv2_vlm.data.conversations import ConversationSet
    from aimv2_vlm.data.transforms import BadImage, decode_image

    try:
        rows = ConversationSet([SimpleNamespace(path=str(path), images=str(images), take="all")])
    except UserError as error:
        return f"2: {error}"
    decoded = 0
    for index in range(len(rows)):
        for name in rows.picture_paths(index):
            with contextlib.suppress(BadImage):
                decode_image(Path(name).read_bytes())
                decoded += 1
    return f"0: {len(rows)} rows, {decoded} pictures, left out: {rows.report()['rejected']}"


def readers(corpus: Path, out: Path) -> dict[str, Callable[[], str]]:
    """What is run over the corpus, by name."""
    shards, pictures = corpus / "shards", corpus / "pictures"
    tiny = [*TINY, "data.max_bad_fraction=0.99", "optim.steps=4", "optim.batch_size=20", "optim.micro_batch_size=20", "data_root=."]

    def pretrain(name: str, path: object, *more: str) -> Callable[[], str]:
        return lambda: command("pretrain", "demo_scenes", f"out={out / name}", f"data.sources.0.path={path}", *tiny, *more)

    return {
        "data check": lambda: command("data", "check", shards / "00000.tar"),
        "data check, pipe:": lambda: command("data", "check", f"pipe:touch {out.parent / 'canary' / 'shell'}"),
        "data check, ::": lambda: command("data", "check", "simplecache::http://127.0.0.1:9/x.tar"),
        "data check, a pickle": lambda: command("data", "check", corpus / "tar" / "pickle.tar"),
        "data pack, table": lambda: command("data", "pack", pictures, out / "packed", "--captions", pictures / "captions.jsonl"),
        "data pack, folder": lambda: command("data", "pack", pictures, out / "packed2"),
        "conversations, lines": lambda: conversations(corpus / "rows" / "rows.jsonl", pictures),
        "conversations, list": lambda: conversations(corpus / "rows" / "rows.json", pictures),
        "conversations, a pickle": lambda: conversations(corpus / "rows" / "pickle.json", pictures),
        "data check, conversations": lambda: command("data", "check", corpus / "rows" / "rows.jsonl", "--images", pictures),
        "pretrain": pretrain("run", shards),
        "pretrain, pipe:": pretrain("run2", f"'pipe:touch {out.parent / 'canary' / 'shell'}'"),
        "pretrain, pickled tokenizer": pretrain("run3", shards, f"text.tokenizer={corpus / 'pickle.model'}"),
        "pretrain, pickled encoder": pretrain("run4", shards, f"encoder.path={corpus / 'encoder'}"),
        "pretrain, a YAML tag": lambda: command("pretrain", corpus / "python.yaml"),
    }


def careless(corpus: Path, canary: Path) -> dict[str, Callable[[], Any]]:
    """The control: how such a corpus gets its way."""
    tar = corpus / "shards" / "00000.tar"

    def member(name: str) -> bytes:
        with tarfile.open(tar) as archive:
            return archive.extractfile(name).read()

    def extract() -> None:
        (canary / "deep").mkdir()
        with tarfile.open(tar) as archive:
            archive.extract("../escaped.txt", canary / "deep", filter="fully_trusted")

    return {
        "unpickled": lambda: pickle.loads(member("run00.pyd")),
        "np.load": lambda: __import__("numpy").load(io.BytesIO(member("run06.npy")), allow_pickle=True),
        "extracted": extract,
        "shell": lambda: subprocess.run(f"touch {canary / 'shell'}", shell=True, check=True),
        "written": lambda: (canary / "written").write_bytes(b""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--control", action="store_true", help="open the corpus carelessly instead: the watch must see it")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    corpus, out, canary = folder / "corpus", folder / "out", folder / "canary"
    canary.mkdir(parents=True)
    out.mkdir()
    write_corpus(corpus, canary)
    sys.dont_write_bytecode = True
    os.environ.update(XDG_CACHE_HOME=str(folder / "cache"), HF_HUB_OFFLINE="1")
    if not arguments.control:  # imported before the watch begins: what libraries do at import is not the corpus's doing
        import aimv2_vlm.data.tools
        import aimv2_vlm.train.run  # noqa: F401
    watch = Watch([out, folder / "cache"], corpus)
    before = {path.name for path in folder.iterdir()} | {"cache"}
    report: dict[str, Any] = {"said": {}, "seen": {}}
    for name, act in (careless(corpus, canary) if arguments.control else readers(corpus, out)).items():
        watch.seen = []
        watch.on = True
        try:
            report["said"][name] = str(act())
        except Exception as error:
            report["said"][name] = f"{type(error).__name__}: {error}"
        finally:
            watch.on = False
        report["seen"][name] = watch.seen
    report["events"] = watch.events
    report["canary"] = sorted(path.name for path in canary.iterdir())
    report["new"] = sorted({path.name for path in folder.iterdir()} - before)
    written = [*out.rglob("*"), *(corpus / "shards").rglob("*")]
    report["links"] = sorted(str(path) for path in written if stat.S_IFMT(path.lstat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR))
    report["imported"] = sorted(name for name, module in list(sys.modules.items()) if str(getattr(module, "__file__", "") or "").startswith(str(folder)))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
