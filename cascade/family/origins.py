"""Where a student's layers come from: the cuts between its teacher and itself, by the graph.

They become inputs of a training that asks, so that its manifest names them, and the manifests of the cuts say
which layers were kept.
"""

from __future__ import annotations

from itertools import count, takewhile

from cascade.distillation.layer_map import composed
from cascade.distillation.settings import RELATIONS
from cascade.family.graph import Node, Section, Teaching
from cascade.family.teachers import role
from cascade.family.workplace import Workplace
from cascade.kinds import Kind
from cascade.storage.artifacts import require_manifest
from cascade.storage.locations import open_location

CUT = "cut"


def cut_inputs(section: Section, student: Node, teaching: Teaching) -> dict[str, Node]:
    """The cuts from the teacher to the student, newest first; none where no map of layers depends on them.

    section: the settings of the training.
    """
    if not needs_origins(section):
        return {}
    (teacher,) = (node for name, node in teaching.inputs.items() if node.kind is not Kind.SIGNALS)
    return {role(CUT, place): node for place, node in enumerate(cuts_between(student, teacher))}


def needs_origins(section: Section) -> bool:
    """Whether more layers are compared than second-to-last with second-to-last."""
    return section.get("hidden_states") == RELATIONS or section.get("hidden_states_layers", 1) > 1


def cuts_between(student: Node, teacher: Node) -> list[Node]:
    """The cuts that made the student out of the teacher, newest first; none if it was not."""
    # What was trained has the layers of what it was trained from.
    same, cuts = {teacher.key}, []
    while "student" in teacher.inputs:
        teacher = teacher.inputs["student"]
        same.add(teacher.key)
    while student.key not in same:
        if student.kind is Kind.PRUNED:
            cuts.append(student)
            student = student.inputs["checkpoint"]
        elif "student" in student.inputs:
            student = student.inputs["student"]
        else:
            return []
    return cuts


def origins_of(place: Workplace) -> tuple[int, ...] | None:
    """Of the job's student in its teacher, by what the cuts among its inputs kept; None without any."""
    inputs = place.job.inputs
    roles = takewhile(inputs.__contains__, (role(CUT, index) for index in count()))
    made = [require_manifest(open_location(inputs[name]["uri"])) for name in roles]
    return composed([one.facts["kept"]["layers"] for one in made]) if made else None
