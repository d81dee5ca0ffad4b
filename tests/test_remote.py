"""Laws of remote shards: what is read is what lies there, in bounded space, and a store that fails is named."""

import functools
import http.server
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import fsspec
import pytest
from conftest import run_cli

from aimv2_vlm.config import ImageInput, PairSource, UserError
from aimv2_vlm.data import remote as remote_module
from aimv2_vlm.data.captions import CaptionTokenizer, train_tokenizer
from aimv2_vlm.data.order import Order
from aimv2_vlm.data.pairs import PairDataset
from aimv2_vlm.data.remote import ShardCache, check_url, find
from aimv2_vlm.data.shards import ShardSet, write_shards
from test_shards import picture, read_all
from test_training import assert_same_weights, pretraining


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "RETRY_WAITS", (0.01, 0.01))
    rows = ({"key": None, "image_bytes": picture(n), "ext": "jpg", "caption": f"a red circle {n}", "json": {}} for n in range(12))
    write_shards(rows, tmp_path / "local", samples_per_shard=2)
    return tmp_path / "local"


@pytest.fixture
def store(local):
    """memory://store holds the shards; a file system of this process alone."""
    system = fsspec.filesystem("memory")
    for path in sorted(local.glob("*.tar")):
        system.pipe_file(f"/store/{path.name}", path.read_bytes())
    yield system
    system.rm("/store", recursive=True)


def cache(tmp_path, shards=100, size=10_240):
    return ShardCache(tmp_path / "cache", shards * size)


def copies(tmp_path):
    return sorted((tmp_path / "cache").glob("*/*.tar"))


PATTERN = "memory://store/{00000..00005}.tar"


@pytest.mark.parametrize("manifest_shards", [1, 100])
@pytest.mark.parametrize("pattern", [PATTERN, "memory://store/*.tar", [f"memory://store/0000{n}.tar" for n in range(6)]])
def test_remote_shards_give_what_local_ones_give(local, store, tmp_path, pattern, manifest_shards):
    there = ShardSet(pattern, shard_cache=cache(tmp_path), manifest_shards=manifest_shards)
    here = ShardSet(local)
    assert read_all(there) == read_all(here) and there.digests == here.digests
    assert [facts["name"] for facts in there.shard_facts()] == [path.name for path in here.paths]


def test_indexes_stay_so_that_opening_fetches_nothing(local, store, tmp_path):
    wanted = read_all(ShardSet(PATTERN, shard_cache=cache(tmp_path)))
    for path in copies(tmp_path):
        path.unlink()
    again = ShardSet(PATTERN, shard_cache=cache(tmp_path))
    assert copies(tmp_path) == [] and again.num_samples == [2] * 6
    again.read(3, 1)
    assert [path.name for path in copies(tmp_path)] == ["00003.tar"]
    assert read_all(again) == wanted


def test_the_cache_keeps_its_limit_and_what_was_used_last(local, store, tmp_path):
    size = max(path.stat().st_size for path in local.glob("*.tar"))
    shards = ShardSet(PATTERN, shard_cache=cache(tmp_path, 3, size), max_open=1)
    for shard in (0, 1, 2, 0, 3):
        shards.read(shard, 0)
        assert sum(path.stat().st_size for path in copies(tmp_path)) <= 3 * size
    assert {path.name for path in copies(tmp_path)} == {"00000.tar", "00002.tar", "00003.tar"}
    assert not list((tmp_path / "cache").rglob("*.partial"))
    with pytest.raises(UserError, match="00000.tar: .* do not fit the shard cache of 100; raise data.shard_cache_gb"):
        ShardSet(PATTERN, shard_cache=ShardCache(tmp_path / "cache", 100))


def test_a_changed_remote_shard_is_another_shard(local, store, tmp_path):
    before = ShardSet(PATTERN, shard_cache=cache(tmp_path))
    store.pipe_file("/store/00001.tar", (local / "00004.tar").read_bytes())
    after = ShardSet(PATTERN, shard_cache=cache(tmp_path))
    assert after.digests[1] == before.digests[4] != before.digests[1]
    assert after.read(1, 0).image_bytes == before.read(4, 0).image_bytes


def test_a_store_that_fails_is_tried_again_and_then_named(local, store, tmp_path, monkeypatch):
    shards = ShardSet(PATTERN, shard_cache=cache(tmp_path))
    wanted = shards.read(0, 0)
    for path in copies(tmp_path):
        path.unlink()
    opened, failures = type(store).open, [ConnectionError("reset by peer"), TimeoutError("slow")]

    def flaky(self, *arguments, **options):
        if failures:
            raise failures.pop()
        return opened(self, *arguments, **options)

    monkeypatch.setattr(type(store), "open", flaky)
    assert ShardSet(PATTERN, shard_cache=cache(tmp_path)).read(0, 0) == wanted and not failures
    store.rm("/store/00002.tar")
    with pytest.raises(UserError, match=r"memory://store/00002.tar: cannot be fetched .*FileNotFoundError.*tried 3 times"):
        shards.read(2, 0)
    assert not list((tmp_path / "cache").rglob("*.partial"))
    with pytest.raises(UserError, match="memory://store/00002.tar: cannot be found"):
        ShardSet(PATTERN, shard_cache=cache(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        find("memory://store/x*.tar")


def test_a_download_that_is_cut_off_is_never_used(local, store, tmp_path):
    shards = ShardSet(PATTERN, shard_cache=cache(tmp_path))
    shards.paths[0].unlink()
    store.store["/store/00000.tar"].truncate(700)
    with pytest.raises(UserError, match="00000.tar: cannot be fetched .*700 of .* bytes came"):
        shards.read(0, 0)
    assert "00000.tar" not in {path.name for path in copies(tmp_path)}


def test_what_killed_processes_left_is_removed(local, store, tmp_path):
    shards = ShardSet(PATTERN, shard_cache=cache(tmp_path))
    folder = copies(tmp_path)[0].parent
    for name, age in (("old", 2 * remote_module.STALE_SECONDS), ("young", 0)):
        (folder / f"00000.tar.{name}.partial").write_bytes(b"x")
        os.utime(folder / f"00000.tar.{name}.partial", (os.stat(folder).st_mtime - age,) * 2)
    shards.remote[0].cache.make_room(shards.paths[0])
    assert [path.name for path in folder.glob("*.partial")] == ["00000.tar.young.partial"]


def test_urls_and_paths_do_not_mix(local, store, tmp_path):
    with pytest.raises(UserError, match="either URLs or local paths"):
        ShardSet([PATTERN, local], shard_cache=cache(tmp_path))
    with pytest.raises(UserError, match="named more than once"):
        ShardSet([PATTERN, "memory://store/00000.tar"], shard_cache=cache(tmp_path))
    for url in ("s3://", "s3:/bucket/x", "S3://bucket/x", "python://x", "local://x"):
        with pytest.raises(UserError, match="only local paths and s3://"):
            check_url(url)


# --- over http, by several processes


class Server(http.server.ThreadingHTTPServer):
    gets: list


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.gets.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(local):
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(local)))
    server.gets = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _keys(shards, queue):
    queue.put([sample.key for sample in read_all(shards)])


def test_processes_share_the_copies(local, server, tmp_path):
    """Two processes that read the same shards at once: each is fetched once, and both read all."""
    url = f"http://127.0.0.1:{server.server_port}/{{00000..00005}}.tar"
    shards = ShardSet(url, shard_cache=cache(tmp_path))
    for path in copies(tmp_path):
        path.unlink()
    server.gets.clear()
    context = multiprocessing.get_context("fork")  # as a DataLoader makes its workers
    queue = context.Queue()
    processes = [context.Process(target=_keys, args=(shards, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    wanted = [sample.key for sample in read_all(ShardSet(local))]
    assert [queue.get(timeout=200) for _ in processes] == [wanted] * 2
    for process in processes:
        process.join()
    assert sorted(server.gets) == sorted({path for path in server.gets}) and len(server.gets) == 6


def test_a_run_from_urls_that_loses_its_cache_ends_with_a_local_runs_weights(scenes_root, tmp_path):
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(scenes_root)))
    server.gets = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run_cli(*pretraining(scenes_root, tmp_path / "here"))

    def source(folder, name):
        shards = sorted(path.name for path in (scenes_root / folder).glob("*.tar"))
        assert shards == [f"{number:05d}.tar" for number in range(len(shards))]
        return f"{{name: {name}, path: 'http://127.0.0.1:{server.server_port}/{folder}/{{00000..{len(shards) - 1:05d}}}.tar'"

    words = pretraining(
        scenes_root, tmp_path / "there", f"data.shard_cache={tmp_path}/cache", f"data.validation=[{source('held_out', 'held_out')}}}]",
        f"data.sources=[{source('shards', 'scenes')}, caption: {{txt: 0.9, 'json:synthetic': 0.1}}}}]")  # fmt: skip
    run_cli(*words, "train.stop_after=3")
    shutil.rmtree(tmp_path / "cache")
    fetched = len(server.gets)
    run_cli(*words)
    assert 0 < fetched < len(server.gets)
    assert_same_weights(tmp_path / "here" / "final", tmp_path / "there" / "final")
    server.shutdown()
    server.server_close()


# --- read-ahead


def test_coming_shards_are_this_window_and_the_next():
    order = Order([[3, 0, 5, 2, 4, 1, 6], [9, 9]], [3, 1], seed=5, window_shards=2)
    for position in range(200):
        place = order.locate(position)
        source, coming = order.coming_shards(position)
        assert source == place.source and place.shard in coming and len(set(coming)) == len(coming) <= 4
    # in one source: whatever comes in the window after this one was announced
    order = Order([[5] * 6], [1.0], seed=5, window_shards=2)
    for position in range(90):
        assert order.locate(position + 10).shard in order.coming_shards(position)[1]


def test_pairs_read_ahead_and_equal_local_pairs(local, server, tmp_path):
    texts = [f"a red circle {n}" for n in range(12)] * 4
    train_tokenizer(texts, tmp_path / "t.model", vocab_size=60)

    def make(path, **options):
        tokenizer = CaptionTokenizer(tmp_path / "t.model", 16)
        return PairDataset([PairSource(path=path, name="x")], 0, ImageInput(size=28), tokenizer, 4, window_shards=1, **options)

    url = f"http://127.0.0.1:{server.server_port}/{{00000..00005}}.tar"
    there, here = make(url, shard_cache=cache(tmp_path)), make(str(local))
    for path in copies(tmp_path):
        path.unlink()
    wanted = {f"{shard:05d}.tar" for shard in there.order.coming_shards(0)[1]}

    def fetch_first():
        assert there.captioned(0) == here.captioned(0)
        for _ in range(3000):
            if {path.name for path in copies(tmp_path)} == wanted:
                return
            threading.Event().wait(0.02)
        raise AssertionError("the next window was not fetched")

    fetch_first()
    for path in copies(tmp_path):
        path.unlink()
    process = multiprocessing.get_context("fork").Process(target=fetch_first)  # as a DataLoader's worker is made
    process.start()
    process.join()
    assert process.exitcode == 0 and len(wanted) == 2
    assert [there.fetch(n)["key"] for n in range(30)] == [here.fetch(n)["key"] for n in range(30)]
    with pytest.raises(UserError, match="data.shard_cache_gb: two windows of 1 shards take"):
        make(url, shard_cache=ShardCache(Path(tmp_path / "cache"), max(there.shards[0].sizes) + 1))
