"""A card: Markdown and the pictures that it shows, to be stored as files or sent as one text."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
CARD = "card.md"


@dataclass(frozen=True)
class Card:
    """Of a stage, or of the family where `stage` is empty.

    text: Markdown that names its pictures by file. pictures: file -> SVG. row: the stage's in the index.
    """

    family: str
    stage: str
    text: str
    pictures: dict[str, str] = field(default_factory=dict)
    row: Json = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """By path below the family's folder."""
        folder = f"{self.stage}/" if self.stage else ""
        texts = {CARD: self.text, **self.pictures}
        return {folder + name: text.encode() for name, text in texts.items()}

    @property
    def inline(self) -> str:
        """One text with its pictures inside, for where there are no files beside it."""

        def replaced(match: re.Match[str]) -> str:
            picture = self.pictures.get(match[2])
            return match[0] if picture is None else f"![{match[1]}]({data_uri(picture)})"

        return re.sub(r"^!\[([^\]\n]*)\]\(([^)\n]*)\)$", replaced, self.text, flags=re.MULTILINE)


def data_uri(svg: str) -> str:
    """The picture as an address that needs no network."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def assembled(title: str, parts: dict[str, str]) -> str:
    """The text of a card: its title, and parts by heading, those that have something to say."""
    sections = [f"## {heading}\n\n{text}" if heading else text for heading, text in parts.items() if text]
    return "\n\n".join([f"# {title}", *sections]) + "\n"
