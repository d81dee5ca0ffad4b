"""Where the pictures of well-known conversation sets lie, and what is wrong with an image folder: one line for each folder of
it, instead of a line for each missing picture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

# LLaVA's mix665k: folders below the image folder, and what belongs there. Cambrian's files use folders of the same names.
KNOWN = {
    "coco/train2017": "unpack COCO's train2017.zip",
    "gqa/images": "unpack GQA's images.zip",
    "ocr_vqa/images": "OCR-VQA's covers, all of them named .jpg",
    "textvqa/train_images": "unpack TextVQA's train_val_images.zip",
    "vg/VG_100K": "unpack Visual Genome's images.zip",
    "vg/VG_100K_2": "unpack Visual Genome's images2.zip",
}


def describe_missing(root: str, names: Iterable[str]) -> list[str]:
    """One line for each folder in which pictures are missing: how many, whether the folder or only their endings differ, what to do.

    names: pictures, relative to `root`, that are not there. A folder that does not exist is named once, at its highest missing
    level (folders of a known layout by their full name).
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(os.path.dirname(name), []).append(name)
    absent: Counter[str] = Counter()
    lines = []
    for folder, missing in sorted(folders.items()):
        if not os.path.isdir(os.path.join(root, folder)):
            absent[folder if folder in KNOWN else _highest_missing(root, folder)] += len(missing)
            continue
        endings = _other_endings(os.path.join(root, folder), missing)
        line = f"{folder or root or '.'}: {_pictures(len(missing))} missing"
        if endings:
            found = ", ".join(f"{count:,} as {ending}" for ending, count in endings.most_common(4))
            line += f", {sum(endings.values()):,} of them there with another ending ({found}); rename them as the rows do:"
            line += " what a file holds is found from its bytes"
        else:
            line += f", for instance {os.path.basename(missing[0])}; {KNOWN.get(folder, 'is the download complete?')}"
        lines.append(line)
    for folder, count in absent.items():
        hint = KNOWN.get(folder, "unpack the set's pictures into it, or give another image folder")
        lines.append(f"{folder}: {_pictures(count)} missing, there is no such folder; {hint}")
    return sorted(lines)


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' * (count != 1)}"


def _highest_missing(root: str, folder: str) -> str:
    while (parent := os.path.dirname(folder)) and not os.path.isdir(os.path.join(root, parent)):
        folder = parent
    return folder


def _other_endings(folder: str, names: list[str]) -> Counter[str]:
    """Endings under which files of these names' stems are in `folder`, and how often."""
    there = dict(os.path.splitext(entry.name) for entry in os.scandir(folder))
    stems = (os.path.splitext(os.path.basename(name))[0] for name in names)
    return Counter(there[stem] for stem in stems if stem in there)
