"""What only a GPU can show: memory and value of the loss in bfloat16 at full size, Triton, a whole build.

N tokens, D hidden size of student and teacher, V vocabulary. Skipped where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.objectives import Objective
from cascade.distillation.states import Head
from cascade.distillation.targets import StateTargets
from cascade.family.build import build, run_options
from cascade.family.plan import plan_family
from cascade.family.runner import NodeHost
from cascade.recipe import Options
from cascade.report import SILENT
from tests.bench.loss_trial import Loss, cascade, liger
from tests.tiny_family import tiny_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch's own compiler is written with what torch deprecates.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

N, D, V = 8192, 4096, 128_256
WHOLE = 4 * N * V
"""Bytes of all logits of one side in float32."""


def whole(student: Tensor, head: Tensor, teacher: Tensor, other: Tensor) -> Tensor:
    """The forward KL by its definition, with every logit in memory."""
    log_q, log_p = (
        (states @ w.T).float().log_softmax(-1) for states, w in ((student, head), (teacher, other))
    )
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def measured(loss: Loss) -> tuple[float, float, float, int]:
    """The value, the norms of both gradients, and the bytes that were added at the peak."""
    draw = torch.Generator("cuda").manual_seed(0)
    student, teacher = (
        torch.randn(N, D, generator=draw, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    head, other = (
        torch.randn(V, D, generator=draw, device="cuda", dtype=torch.bfloat16).mul_(3 * D**-0.5)
        for _ in range(2)
    )
    student.requires_grad_()
    head.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = loss(student, head, teacher, other)
    value.backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert student.grad is not None
    assert head.grad is not None
    return value.item(), student.grad.float().norm().item(), head.grad.float().norm().item(), extra


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_loss_at_full_size_is_that_of_whole_logits_in_a_fraction_of_the_memory(compiled: bool) -> None:
    *ours, extra = measured(cascade(compiled=compiled))
    *plain, most = measured(whole)
    assert ours == pytest.approx(plain, rel=1e-2)
    # The head's gradient, float32 and then bfloat16, is most of it.
    assert extra < 6 * V * D + WHOLE / 4 < most


def test_the_loss_at_full_size_is_ligers() -> None:
    pytest.importorskip("liger_kernel")
    *ours, extra = measured(cascade())
    *theirs, peer = measured(liger(1024))
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert extra < 1.5 * peer


@pytest.mark.parametrize("objective", Objective)
def test_a_compiled_loss_is_the_plain_one(objective: Objective) -> None:
    torch.compiler.reset()
    draw = torch.Generator("cuda").manual_seed(1)
    shapes = ((700, 64), (32_000, 64), (700, 96), (32_000, 96))
    student, head, teacher, other = (torch.randn(*s, generator=draw, device="cuda") for s in shapes)
    labels = torch.randint(32_000, (700,), generator=draw, device="cuda")
    found = []
    for compiled in (False, True):
        states, weight = student.clone().requires_grad_(), head.clone().requires_grad_()
        terms = fused_distillation_loss(
            states,
            Head(weight),
            StateTargets(teacher, Head(other)),
            labels,
            objective=objective,
            temperature=2.0,
            cross_entropy_weight=0.3,
            compiled=compiled,
        )
        terms.loss.backward()
        found.append((terms.loss.detach(), terms.kl, terms.ce, states.grad, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_family_is_built(tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, compiled: bool) -> None:
    recipe = tiny_recipe(tiny_parent, tiny_corpus)
    options = Options(cache=str(tmp_path / "cache"), device="cuda", compile=compiled)
    run = run_options(recipe, str(tmp_path / "store"), options)
    with NodeHost() as host:
        graph = plan_family(recipe, tmp_path / "cache", "cuda")
        index = build(graph, run, lambda job: host.run(job, SILENT))
    for stage in index["stages"]:
        assert 0 < stage["kl_to_parent"] < stage["pruned_kl_to_parent"]
