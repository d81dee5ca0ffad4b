"""Interleaved documents: pictures inside running text, as web pages have them. Every text token is learned, no image token is.

OBELICS-style rows have two lists of equal length, `images` and `texts`, one of which is null in each place. MMC4-style rows
have `text_list`, sentences, and `image_info`, whose entries name a file (`image_name`) and the sentence that the picture
stands in front of (`matched_text_index`). Nothing is downloaded: pictures are files below the source's image folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Document:
    """One usable document. A piece is text as it is learned, or None for the next of `images`; it may be cut between pieces."""

    id: str
    images: tuple[str, ...]
    pieces: tuple[str | None, ...]

    @property
    def texts(self) -> list[str]:
        return [piece for piece in self.pieces if piece is not None]

    @property
    def begins_with_picture(self) -> bool:
        """Whether every part of it that may be trained on, from its beginning to a cut, holds a picture."""
        return self.pieces[0] is None


def parse_obelics(row: dict[str, Any], name: str) -> Document | str:
    """A row's document, or the reason why it has none. Paragraphs (blank lines between them) are pieces of their own."""
    images, texts = row.get("images"), row.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list) or not texts:
        return "no_document"
    if len(images) != len(texts):
        return "length_mismatch"
    parts: list[tuple[str | None, str | None]] = []
    for image, text in zip(images, texts, strict=True):
        if not isinstance(image, (str, type(None))) or not isinstance(text, (str, type(None))) or (image and text):
            return "malformed_piece"
        if image:
            parts.append((image, None))
        elif text:
            parts += [(None, paragraph) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    return _document(name, parts, between="\n\n")


def parse_mmc4(row: dict[str, Any], name: str) -> Document | str:
    """A row's document, or the reason why it has none. Sentences are pieces."""
    sentences, pictures = row.get("text_list"), row.get("image_info")
    if not isinstance(sentences, list) or not sentences or not isinstance(pictures, list):
        return "no_document"
    if not all(isinstance(sentence, str) for sentence in sentences):
        return "malformed_piece"
    before: dict[int, list[str]] = {}
    for picture in pictures:
        image, place = (picture.get("image_name"), picture.get("matched_text_index")) if isinstance(picture, dict) else (None, None)
        if not isinstance(image, str) or not image or type(place) is not int or not 0 <= place < len(sentences):
            return "bad_match"
        before.setdefault(place, []).append(image)
    parts: list[tuple[str | None, str | None]] = []
    for place, sentence in enumerate(sentences):
        parts += [(image, None) for image in before.get(place, [])]
        parts += [(None, sentence)] if sentence.strip() else []
    return _document(name, parts, between=" ")


PARSERS: dict[str, Callable[[dict[str, Any], str], Document | str]] = {"obelics": parse_obelics, "mmc4": parse_mmc4}


def _document(name: str, parts: Sequence[tuple[str | None, str | None]], between: str) -> Document | str:
    """Texts stripped; what separates a piece from the one before it stands at its front: a line break behind a picture
    and in front of one, `between` two texts."""
    images = [image for image, _ in parts if image is not None]
    if any(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", image) for image in images):
        return "picture_is_url"
    if len(images) == len(parts):
        return "no_text"
    pieces: list[str | None] = []
    for image, text in parts:
        behind_picture = bool(pieces) and pieces[-1] is None
        if text is not None:
            pieces.append(("\n" if behind_picture else between if pieces else "") + text.strip())
        else:
            # A picture cannot carry its own line break: it belongs to the text in front of it.
            if pieces and not behind_picture:
                pieces[-1] += "\n"
            pieces.append(None)
    return Document(name, tuple(images), tuple(pieces))
