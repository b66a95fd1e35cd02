"""Passages of text: the paragraphs of text files, or those of SQuAD's JSON."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mslt.errors import MsltError

_BETWEEN = re.compile(r"\n\s*\n")


def read_passages(paths: Sequence[Path]) -> list[str]:
    """In their order, each once, on one line. MsltError for files that cannot be read, or hold no text."""
    found = dict.fromkeys(passage for path in paths for passage in _read(path))
    if not found:
        raise MsltError(f"--text {', '.join(map(str, paths))}: holds no text; give text files, or SQuAD's JSON")
    return list(found)


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MsltError(f"--text {path}: not readable as UTF-8 ({error}); give a text file, or SQuAD's JSON") from None
    if path.suffix == ".json":
        try:
            paragraphs = [
                each["context"] for article in json.loads(text)["data"] for each in article["paragraphs"]
            ]  # fmt: skip
        except (ValueError, KeyError, TypeError):
            raise MsltError(f"--text {path}: is no JSON of SQuAD's (data, paragraphs, context); give its own file, or "
                            "text") from None  # fmt: skip
    else:
        paragraphs = _BETWEEN.split(text)
    return [joined for paragraph in paragraphs if (joined := " ".join(paragraph.split()))]
