"""The quality gate of a stage: how good its child has to be before the family becomes `stable`.

The limits belong to a stage, for a small child may lose more than a large one. None of them is part of a key:
another limit judges what is there already.
"""

from __future__ import annotations

from cascade.fields import Count, Section, setting


class Gate(Section):
    """Limits of one child; a family whose children keep all of them becomes `stable`."""

    loss_above_parent: float | None = setting(
        None,
        0,
        "Loss above the parent's",
        "Nats a token that the child's held-out cross-entropy may be above the parent's.",
        ge=0,
        le=100,
    )
    loss_above_stable: float | None = setting(
        None,
        1,
        "Loss above stable's",
        "The same, above this stage's in the family that is `stable` now.",
        ge=0,
        le=100,
    )
    kl_to_parent: float | None = setting(
        None,
        2,
        "KL to the parent",
        "Nats a token that its divergence from the parent may have.",
        ge=0,
        le=100,
    )
    top1_agreement: float | None = setting(
        None,
        3,
        "Top-1 agreement",
        "Share of the tokens on which it has to choose what the parent chooses.",
        ge=0,
        le=1,
    )
    parameters: Count | None = setting(None, 4, "Parameters", "Parameters that it may have.", ge=1)
    speed_of_parent: float | None = setting(
        None,
        5,
        "Speed, of the parent's",
        "Tokens/s it has to reach, as a multiple of the parent's.",
        gt=0,
        le=1000,
    )
    speed_of_stable: float | None = setting(
        None,
        6,
        "Speed, of stable's",
        "The same, as a multiple of this stage's in the family that is `stable` now.",
        gt=0,
        le=1000,
    )
