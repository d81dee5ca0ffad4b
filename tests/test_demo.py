"""The demo itself, at a size that takes a minute: every stage runs, the report is there, a second start does nothing again."""

from __future__ import annotations

import json

from conftest import TINY_PRETRAINING, TINY_TUNING

from aimv2_vlm import demo

SMALL = {
    "pretrain": [*TINY_PRETRAINING, "optim.steps=4"],
    "sft": [*TINY_TUNING, "optim.steps=4"],
    "eval": ["limit=4", "max_new_tokens=6", "precision=fp32", "benchmarks=[scenes_objects, scenes_print]"],
}


def test_the_demo_goes_from_nothing_to_a_report_and_a_second_start_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PRETRAINING_SAMPLES", 40)
    monkeypatch.setattr(demo, "HELD_OUT_SAMPLES", 8)
    monkeypatch.setattr(demo, "TUNING_PICTURES", 12)
    monkeypatch.setattr(demo, "TEST_PICTURES", 6)
    out = tmp_path / "demo"
    assert demo.demo(str(out), overrides=SMALL) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("1x1", "2x2", "2x2 upsampled", "scenes_print")) and "http://" not in page.replace("http://www.w3.org", "")
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".safetensors", ".tar", ".parquet", ".bin")}
    assert demo.demo(str(out), overrides=SMALL) == 0
    assert made == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".safetensors", ".tar", ".parquet", ".bin")}
    cells = [json.loads(line) for line in (out / "eval" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(cells) == 3 * 2 * 3 and {c["source_size"] for c in cells} == {None, 56}
