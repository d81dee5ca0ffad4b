"""Every row of a conversation file is used or counted under the right reason; files of any length open by offset."""

import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from aimv2_vlm.config import ConversationSource, UserError
from aimv2_vlm.data import conversations as conversations_module
from aimv2_vlm.data.conversations import (
    IMAGE,
    REASONS,
    Conversation,
    ConversationSet,
    Rejection,
    Rows,
    Turn,
    check_bad_fraction,
    parse_row,
)


def row(*values, image="a.png", **more):
    speakers = ["human", "gpt"] * len(values)
    return {
        "id": "r",
        "image": image,
        "conversations": [{"from": s, "value": v} for s, v in zip(speakers, values)],
        **more,
    }


BAD = [
    ("not_an_object", [1, 2]),
    ("not_an_object", "text"),
    ("video", row("q", "a", video="v.mp4")),
    ("bad_image_field", row("q", "a", image=3)),
    ("bad_image_field", row("q", "a", image=["a.png", None])),
    ("bad_image_field", row("q", "a", image=["a.png", ""])),
    ("bad_image_field", row("q", "a", image={"path": "a.png"})),
    ("bad_image_field", row("q", "a", image=None, images=[{"path": "a.png"}])),
    ("bad_image_field", {"images": [{"path": "a.png"}], **{k: v for k, v in row("q", "a").items() if k != "image"}}),
    ("no_conversation", {"id": 1, "image": "a.png"}),
    ("no_conversation", row()),
    ("no_conversation", {"id": 1, "conversations": "q"}),
    ("malformed_turn", {"conversations": ["q", "a"]}),
    ("malformed_turn", row("q", None)),
    ("malformed_turn", row("q", 3)),
    ("malformed_turn", {"conversations": [{"value": "q"}, {"from": "gpt", "value": "a"}]}),
    ("unknown_speaker", {"conversations": [{"from": "bot", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    (
        "system_turn_inside",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "system", "value": "s"},
                {"from": "gpt", "value": "a"},
            ]
        },
    ),
    ("invalid_text", row("q \ud83d", "a")),
    ("invalid_text", row("q", "\udc00a")),
    ("invalid_text", row("q", "a", image="\ud800.png")),
    ("first_turn_not_user", {"conversations": [{"from": "gpt", "value": "a"}]}),
    ("first_turn_not_user", {"conversations": [{"from": "system", "value": "s"}]}),
    (
        "same_speaker_twice",
        {"conversations": [{"from": "human", "value": v} for v in "qr"] + [{"from": "gpt", "value": "a"}]},
    ),
    (
        "same_speaker_twice",
        {"conversations": [{"from": "human", "value": "q"}] + [{"from": "gpt", "value": v} for v in "ab"]},
    ),
    ("last_turn_user", row("q", "a", "r")),
    ("last_turn_user", row("q")),
    ("empty_answer", row("q", "")),
    ("empty_answer", row("q", "a", "r", " \n\t")),
    ("empty_question", row("q", "a", " ", "b")),
    ("empty_question", row("", "a", image=None)),
    ("placeholder_without_image", row(f"{IMAGE}\nq", "a", image="")),
    ("image_count_mismatch", row(f"{IMAGE}{IMAGE} q", "a")),
    ("image_count_mismatch", row(f"{IMAGE} q", "a", image=["a.png", "b.png"])),
    ("image_count_mismatch", row("q", "a", image=["a.png", "b.png"])),
]


@pytest.mark.parametrize("reason,bad", BAD)
def test_bad_rows_have_a_reason(reason, bad):
    verdict = parse_row(bad, 7)
    assert isinstance(verdict, Rejection) and verdict.reason == reason and verdict.row == 7


@pytest.mark.parametrize("image", ["", "None", "none", "nan", None, float("nan"), [], " "])
def test_all_ways_to_say_that_there_is_no_image(image):
    assert parse_row(row("q", "a", image=image), 0).images == ()
    without = row("q", "a")
    del without["image"]
    assert parse_row(without, 0).images == ()


def test_a_row_without_image_may_call_them_images():
    assert parse_row(row("q", "a", image=None, images=["b.png"]), 0).images == ("b.png",)
    assert parse_row(row("q", "a", image="a.png", images=["b.png"]), 0).images == ("a.png",)
    assert parse_row(row("q", "a", image="", images=["b.png"]), 0).images == ()
    for other in (0, 3, {"count": 0}):  # a key of one's own, as any other
        assert parse_row(row("q", "a", image=None, images=other), 0).images == ()


@pytest.mark.parametrize(
    "value,expected",
    [
        (f"{IMAGE}\nWhat?", f"{IMAGE}\nWhat?"),
        (f"What?\n{IMAGE}", f"{IMAGE}\nWhat?"),
        (f"{IMAGE}What?", f"{IMAGE}\nWhat?"),
        (f"What {IMAGE} is", f"{IMAGE}\nWhat  is"),
        ("What?", f"{IMAGE}\nWhat?"),
        (IMAGE, IMAGE),
        (f" {IMAGE}\n\n", IMAGE),
    ],
)
def test_a_single_image_moves_to_the_front(value, expected):
    assert parse_row(row(value, "a"), 0).turns[0].text == expected


def test_a_single_image_may_stand_in_a_later_turn():
    turns = parse_row(row("hello", "hi", f"and this {IMAGE}?", "a cat"), 0).turns
    assert [turn.text for turn in turns] == ["hello", "hi", f"{IMAGE}\nand this ?", "a cat"]


def test_several_images_keep_their_places():
    text = f"compare {IMAGE} and {IMAGE}."
    assert parse_row(row(text, "a", image=["a.png", "b.png"]), 0) == Conversation(
        "r", ("a.png", "b.png"), (Turn("user", text), Turn("assistant", "a"))
    )


def test_image_in_an_answer_or_system_turn_is_text():
    turns = [
        {"role": "system", "content": f"s {IMAGE}"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": IMAGE},
    ]
    parsed = parse_row({"id": 5, "conversations": turns}, 0)
    assert parsed == Conversation("5", (), (Turn("user", "q"), Turn("assistant", IMAGE)), f"s {IMAGE}")


def test_ids_are_text_numbers_or_absent():
    assert [parse_row({**row("q", "a"), "id": i}, 3).id for i in ("x", 0, 12, None, "", True)] == ["x", "0", "12"] + [
        "row 3"
    ] * 3


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([IMAGE, "human", "gpt", "system", "a.png"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["id", "image", "video", "conversations", "from", "value", "role", "content"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_any_json_is_a_conversation_or_a_named_rejection(value):
    verdict = parse_row(value, 0)
    if isinstance(verdict, Rejection):
        assert verdict.reason in REASONS[1:]
    else:
        assert [turn.role for turn in verdict.turns] == ["user", "assistant"] * (len(verdict.turns) // 2)
        assert sum(t.text.count(IMAGE) for t in verdict.turns[::2]) == len(verdict.images)
        assert all(t.text.strip() for t in verdict.turns)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    return folder


def open_set(path, images="", take="all", **more):
    return ConversationSet([SimpleNamespace(path=str(path), images=str(images), take=take)], **more)


def good_rows(number):
    return [
        {**row(f'question {i} naïve 漢字 "quoted" \\ [{{', f"answer {i}"), "id": i if i % 2 else f"text-{i}"}
        for i in range(number)
    ]


def write_both(folder, rows):
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "escaped.json").write_text(json.dumps(rows))
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    return [folder / name for name in ("rows.json", "escaped.json", "rows.jsonl")]


def test_lists_and_lines_give_the_same_rows_by_offset(tmp_path, pictures):
    rows = good_rows(25)
    for path in write_both(tmp_path, rows):
        conversations = open_set(path, pictures)
        assert len(conversations) == 25 and [json.loads(Rows(path).read(i)) for i in (24, 0, 13)] == [
            rows[24],
            rows[0],
            rows[13],
        ]
        assert [c.id for c in map(conversations.__getitem__, range(25))] == [str(r["id"]) for r in rows]
        assert conversations.picture_paths(3) == [str(pictures / "a.png")]
        again = deepcopy(conversations)
        assert again[24] == conversations[24]


def test_byte_order_mark_blank_lines_and_no_last_newline(tmp_path, pictures):
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(good_rows(3)).encode())
    (tmp_path / "blank.jsonl").write_text("\n" + "\n\n".join(json.dumps(r) for r in good_rows(3)))
    assert len(open_set(tmp_path / "bom.json", pictures)) == len(open_set(tmp_path / "blank.jsonl", pictures)) == 3


def test_bad_rows_of_every_kind_are_counted_and_named(tmp_path, pictures):
    rows = [bad for _, bad in BAD] + [
        row("q", "a"),
        row("q", "a", image="lost.png"),
        row("q", "a", image="../../x\0.png"),
    ]
    lines = [json.dumps(r) for r in rows] + ['{"id": 1, "conversations": [', "\x00"]
    (tmp_path / "bad.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"id": "\xff"}\n')
    conversations = open_set(tmp_path / "bad.jsonl", pictures)
    expected = {reason: sum(r == reason for r, _ in BAD) for reason, _ in BAD} | {
        "missing_picture": 1,
        "outside_image_folder": 1,
        "invalid_json": 3,
    }
    report = conversations.report()
    assert report["rejected"] == expected and report["good"] == len(conversations) == 1
    assert report["rows"] == len(BAD) + 6 and set(report["rejected"]) == set(REASONS[1 : REASONS.index("no_document")])
    assert json.loads(json.dumps(report)) == report
    named = list(conversations.rejections())
    assert len(named) == len(BAD) + 5 and all(path.endswith("bad.jsonl") for path, _ in named)


def test_the_index_is_kept_and_made_again_when_the_file_changes(tmp_path, pictures):
    path = write_both(tmp_path, good_rows(4))[2]
    open_set(path, pictures)
    index = tmp_path / "rows.jsonl.rows"
    first = index.read_bytes()
    written = index.stat().st_mtime_ns
    assert len(open_set(path, pictures)) == 4 and index.stat().st_mtime_ns == written
    path.write_text(path.read_text() + json.dumps(good_rows(1)[0]) + "\n")
    assert len(open_set(path, pictures)) == 5 and index.read_bytes() != first
    index.write_bytes(b"garbage")
    assert len(open_set(path, pictures)) == 5


def test_a_kept_index_does_not_hide_pictures_that_came_later(tmp_path, pictures):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row("q", "a", image=name)) for name in ("a.png", "late.png")))
    assert open_set(path, pictures).report()["rejected"] == {"missing_picture": 1}
    Image.new("RGB", (8, 8)).save(pictures / "late.png")
    assert len(open_set(path, pictures)) == 2
    assert open_set(path, tmp_path / "images", cache_dir=str(tmp_path / "cache")).report()["rejected"] == {}


OUTSIDE = ["../secret.png", "/etc/hostname", "x/../../secret.png", "..", "out.png", "away/secret.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_the_image_folder_are_left_out(tmp_path, pictures, name):
    """By `..`, by an absolute name, by a link to a file or of a folder. Links inside, and a folder that is a link itself, do."""
    for place in (tmp_path / "secret.png", tmp_path / "elsewhere" / "secret.png"):
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(place)
    (pictures / "out.png").symlink_to(tmp_path / "secret.png")
    (pictures / "away").symlink_to(tmp_path / "elsewhere")
    (pictures / "in.png").symlink_to(pictures / "a.png")
    (tmp_path / "link").symlink_to(pictures)
    rows = [row("q", "a", image=[n, "a.png"]) | {"conversations": row(f"{IMAGE}{IMAGE}", "a")["conversations"]} for n in ("in.png", name)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    for folder in (pictures, tmp_path / "link"):
        assert open_set(path, folder).report()["rejected"] == {"outside_image_folder": 1}
    source = ConversationSource(path=str(path), images=str(pictures), follow_links=True)
    rejected = ConversationSet([source]).report()["rejected"]
    assert rejected == ({} if name in OUTSIDE[-2:] else {"outside_image_folder": 1})


def test_each_picture_is_looked_for_once(tmp_path, pictures, monkeypatch):
    """However many rows share it: one look at the file, one at its folder."""
    path = write_both(tmp_path, good_rows(200))[2]
    looks = []
    monkeypatch.setattr(os, "lstat", lambda p, real=os.lstat: looks.append(p) or real(p))
    open_set(path, pictures)
    assert 1 <= len([p for p in looks if str(p).endswith("a.png")]) <= 2


def test_missing_pictures_are_named_folder_by_folder(tmp_path):
    """mix665k's layout: an absent folder, covers with other endings, an incomplete download, a set of unknown layout."""
    images = tmp_path / "images"
    for folder in ("ocr_vqa/images", "gqa/images"):
        (images / folder).mkdir(parents=True)
    for stem, ending in (("1", ".gif"), ("2", ".png"), ("3", ".gif"), ("4", ".jpg")):
        (images / "ocr_vqa/images" / f"{stem}{ending}").write_bytes(b"")
    names = [f"coco/train2017/{n:012d}.jpg" for n in range(1500)] + [f"ocr_vqa/images/{n}.jpg" for n in range(1, 6)]
    names += ["gqa/images/1.jpg", "charts/deep/1/a.png", "charts/deep/2/a.png", "vg/VG_100K_2/7.jpg"]
    (tmp_path / "rows.json").write_text(json.dumps([row("q", "a", image=name) for name in [*names, names[0]]]))
    report = open_set(tmp_path / "rows.json", images).report()
    assert report["rejected"] == {"missing_picture": len(names)}
    expected = [
        "charts: 2 pictures missing, there is no such folder; unpack",
        "coco/train2017: 1,500 pictures missing, there is no such folder; unpack COCO's train2017.zip",
        "gqa/images: 1 picture missing, for instance 1.jpg; unpack GQA",
        "ocr_vqa/images: 4 pictures missing, 3 of them there with another ending (2 as .gif, 1 as .png); ",
        "vg/VG_100K_2: 1 picture missing, there is no such folder; unpack Visual Genome's images2.zip",
    ]
    lines = report["missing_folders"]
    assert len(lines) == 5 and all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
    with pytest.raises(UserError, match="charts: 2 pictures missing"):
        check_bad_fraction(report, 0.01)


def test_the_index_goes_elsewhere_when_asked(tmp_path, pictures):
    path = write_both(tmp_path, good_rows(2))[0]
    open_set(path, pictures, cache_dir=str(tmp_path / "cache"))
    assert len(os.listdir(tmp_path / "cache")) == 1 and not (tmp_path / "rows.json.rows").exists()


@pytest.mark.parametrize(
    "take,count", [("all", 20), ("first:7", 7), ("random:7", 7), ("50%", 10), ("12.5%", 2), ("100%", 20)]
)
def test_shares_of_a_source(tmp_path, pictures, take, count):
    path = write_both(tmp_path, good_rows(20))[0]
    ids = [open_set(path, pictures, take)[i].id for i in range(count)]
    assert len(open_set(path, pictures, take)) == len(set(ids)) == count
    assert take != "first:7" or ids == [str(r["id"]) for r in good_rows(7)]
    assert ids == [open_set(path, pictures, take)[i].id for i in range(count)]
    if take == "random:7":
        assert ids != [open_set(path, pictures, take, seed=1)[i].id for i in range(count)]


def test_large_files_are_judged_by_several_processes_alike(tmp_path, pictures, monkeypatch):
    """Their number changes nothing but the time; without more than one core, or inside a worker, one process does it."""
    rows = [*good_rows(30), row("q", ""), row("q", "a", image="lost.png"), row("q", "a", image="../x.png"), *good_rows(8)]
    path = write_both(tmp_path, rows)[0]
    alone = open_set(path, pictures, cache_dir=str(tmp_path / "alone")).report()
    starts = []
    monkeypatch.setattr(conversations_module, "PARALLEL_ROWS", 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(
        conversations_module, "ProcessPoolExecutor", lambda count, mp_context: starts.append(count) or ProcessPoolExecutor(count, mp_context=mp_context)
    )
    assert open_set(path, pictures, cache_dir=str(tmp_path / "together")).report() == alone and starts == [2]
    assert alone["rejected"] == {"empty_answer": 1, "missing_picture": 1, "outside_image_folder": 1}
    one, other = (load_file(next((tmp_path / name).iterdir())) for name in ("alone", "together"))
    assert all(np.array_equal(one[name], other[name]) for name in ("spans", "verdicts"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(["good", *dict.fromkeys(r for r, _ in BAD)]), min_size=1, max_size=12), min_size=1, max_size=3), st.data())
def test_every_good_row_of_a_mixture_goes_through_and_every_bad_one_is_counted(tmp_path, pictures, kinds, data):
    """Sources of any share: what is taken are good rows of that source, each once, in its order; counts add up."""
    bad, sources, expected = dict(BAD), [], []
    for number, source in enumerate(kinds):
        rows = [row("q", "a") if kind == "good" else bad[kind] for kind in source]
        rows = [{**r, "id": f"{number}-{n}"} if isinstance(r, dict) else r for n, r in enumerate(rows)]
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(rows))
        (tmp_path / f"{number}.json.rows").unlink(missing_ok=True)  # files of one size within one tick of the clock
        good = [f"{number}-{n}" for n, kind in enumerate(source) if kind == "good"]
        take, count = data.draw(st.sampled_from([("all", len(good)), (f"first:{len(good) // 2}", len(good) // 2), (f"random:{len(good) // 2}", len(good) // 2),
                                                 ("50%", len(good) // 2)]))  # fmt: skip
        expected.append((good, take, count))
        sources.append(ConversationSource(path=str(path), images=str(pictures), take=take))
    if not sum(count for *_, count in expected):
        with pytest.raises(UserError, match="no usable conversation"):
            ConversationSet(sources)
        return
    mixture = ConversationSet(sources)
    taken = [mixture[index].id for index in range(len(mixture))]
    for number, (good, take, count) in enumerate(expected):
        mine = [name for name in taken if name.startswith(f"{number}-")]
        assert len(mine) == count and mine == [name for name in good if name in set(mine)]
        assert take not in ("all", f"first:{count}") or mine == good[:count]
    report = mixture.report()
    counted = Counter(kind for source in kinds for kind in source if kind != "good")
    assert report["rejected"] == counted and report["good"] + sum(counted.values()) == report["rows"] == sum(map(len, kinds))
    assert taken == sorted(taken, key=lambda name: int(name[0])) and report["taken"] == len(taken)


def test_sources_follow_each_other(tmp_path, pictures):
    one, _, two = write_both(tmp_path, good_rows(3))
    sources = [SimpleNamespace(path=str(p), images=str(pictures), take=t) for p, t in ((one, "first:2"), (two, "all"))]
    conversations = ConversationSet(sources)
    assert [conversations[i].id for i in range(5)] == ["text-0", "1", "text-0", "1", "text-2"]
    assert conversations.where(4).endswith("rows.jsonl: row 2")
    with pytest.raises(IndexError):
        conversations[5]


@pytest.mark.parametrize(
    "content,message",
    [
        ("{}", "list"),
        ("", "list"),
        ("[{}", "complete"),
        ('[{"a": 1} {"b": 2}]', "byte"),
        ("[{,}]", "byte"),
        ("[" * 100_000, "byte"),
    ],
)
def test_broken_lists_are_refused_with_the_place(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=f"x.json.*{message}"):
        open_set(tmp_path / "x.json")


@pytest.mark.parametrize("take", ["some", "first:", "first:21", "random:-1", "random:99", "101%", "%", "1e1%"])
def test_shares_that_make_no_sense_are_refused(tmp_path, pictures, take):
    with pytest.raises(UserError, match="take"):
        open_set(write_both(tmp_path, good_rows(20))[0], pictures, take)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.json"):
        open_set(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="no such image folder"):
        open_set(write_both(tmp_path, good_rows(2))[0], tmp_path / "nowhere")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no usable conversation"):
        open_set(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_number_longer_than_python_reads_is_its_rows_fault(tmp_path, ending):
    lines = [json.dumps(row("q", "a", image=None, id=1)), '{"id": ' + "1" * 5000 + ', "conversations": []}', json.dumps(row("q", "b", image=None, id=2))]
    path = tmp_path / f"rows.{ending}"
    path.write_text("\n".join(lines) if ending == "jsonl" else "[" + ",\n".join(lines) + "]")
    rows = ConversationSet([ConversationSource(path=str(path), images=None)])
    assert len(rows) == 2 and [rejection.reason for _, rejection in rows.rejections()] == ["invalid_json"]


def test_too_many_bad_rows_stop_the_run():
    def report(bad, rows):
        return {"rows": rows, "rejected": {"empty_answer": bad}, "sources": [{"path": "x.json"}]}

    check_bad_fraction(report(10, 1000), 0.01)
    check_bad_fraction(report(500, 999), 0.01)
    with pytest.raises(UserError, match="empty_answer 11"):
        check_bad_fraction(report(11, 1000), 0.01)
    with pytest.raises(UserError, match="x.json"):
        check_bad_fraction(report(500, 999), 0.01, at_least=0)
