"""What code derives in README.md and deploy/prefect.yaml; `python -m tests.docs` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic_core import PydanticUndefined

from cascade.dials import Prune, Shape
from cascade.fields import Section
from cascade.planning.axes import Axis
from cascade.quality import Gate
from cascade.recipe import Recipe, Stage
from cascade.roles import TeacherModel
from cascade.teacher import Teacher
from cascade.texts import Corpus, Source, Watch
from cascade.trainings import Distill, Extend, OnPolicy, Rope
from tests.architectures import ARCHITECTURES, BOUND, UNTURNED, cuts
from tests.deployment_file import FILE, rendered

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
REFERENCE, DECODERS = "recipe reference", "decoders"
SECTIONS: dict[str, type[Section]] = {
    "": Recipe,
    "corpus.": Corpus,
    "corpus.sources[].": Source,
    "teacher.": Teacher,
    "teacher.models[].": TeacherModel,
    "teacher.rope.": Rope,
    "stages[].": Stage,
    "stages[].prune.": Prune,
    "stages[].prune.shape.": Shape,
    "stages[].distill.": Distill,
    "stages[].on_policy.": OnPolicy,
    "stages[].extend.": Extend,
    "stages[].extend.rope.": Rope,
    "stages[].gate.": Gate,
    "watch.": Watch,
}


def recipe_reference() -> str:
    """A Markdown table of every key of a recipe, from the fields' own descriptions."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for prefix, section in SECTIONS.items():
        for name, field in section.model_fields.items():
            default = "required" if field.default is PydanticUndefined else default_text(field.default)
            lines.append(f"| `{prefix}{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def default_text(value: object) -> str:
    """A default as one would write it in YAML."""
    if value is None:
        return ""
    if isinstance(value, Section):
        return "see below"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def decoder_table() -> str:
    """A Markdown table of the architectures that are cut in tests, on which axes, and whether rotated."""
    lines = [f"| architecture | {' | '.join(Axis)} | rotation |", "|---" * (len(Axis) + 2) + "|"]
    for name in ARCHITECTURES:
        tested = {axis for sizes in cuts(name).values() for axis in sizes}
        cells = ["yes" if axis in tested else "" for axis in Axis]
        if name in BOUND:
            cells[list(Axis).index(Axis.HIDDEN)] = "with heads"
        cells.append("" if name in UNTURNED else "yes")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_derived(readme: str) -> str:
    """The README with the current tables between their marks."""
    for mark, table in ((REFERENCE, recipe_reference()), (DECODERS, decoder_table())):
        begin, end = f"<!-- {mark} -->", f"<!-- end of the {mark} -->"
        pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
        readme = pattern.sub(f"{begin}\n{table}\n{end}", readme)
    return readme


def main() -> None:
    """Write both files anew."""
    README.write_text(with_derived(README.read_text("utf-8")), "utf-8")
    FILE.write_text(rendered(), "utf-8")


if __name__ == "__main__":
    main()
