"""Self-contained HTML pages: a shell that forbids scripts and requests, and harmless text and pictures to put into it."""

from __future__ import annotations

import base64
import html
import io
import re
from typing import Any

_SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{header}
</header>
<main>
{main}
</main>
</body>
</html>
"""


def page(title: str, style: str, header: str, main: str) -> str:
    """A whole page. title: any text; style: CSS; header, main: HTML, in which whatever comes from data is escaped already."""
    return _SHELL.format(title=text(title), style=style, header=header, main=main)


def text(value: Any) -> str:
    """Any value as harmless HTML text: escaped, control characters and lone surrogates replaced."""
    plain = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", plain), quote=True)


def picture_uri(picture: "PIL.Image.Image", side: int, quality: int) -> str:  # noqa: F821
    """A picture as the data URI of a JPEG; `picture` itself is reduced to a longer side of at most `side` pixels."""
    picture.thumbnail((side, side))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
