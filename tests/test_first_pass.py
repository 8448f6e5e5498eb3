"""Where the first pass of self-conditioning is made in training: FastDiSS's perturbation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import langflow, lively, loaded, with_tokenizer

from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.continuous.systems.langflow import LangFlow
from cdlm.core.errors import CdlmError
from cdlm.core.types import Batch, Condition

B, N = 8, 6


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (B, N), generator=torch.Generator().manual_seed(5))
    return Batch(tokens, None, torch.arange(N) >= torch.arange(B)[:, None] % 3, generator)


def calls_of(model: EmbeddingDiffusion, own: Batch) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The loss, and state and level of each call of the network."""
    seen: list[tuple[Tensor, Tensor]] = []
    inner = model.logits

    def logits(z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        seen.append((z.detach(), t.detach()))
        return inner(z, t, condition)

    setattr(model, "logits", logits)  # noqa: B010
    return model(own).total.detach(), seen


@pytest.mark.parametrize("make", [lively, langflow])
@given(steps=st.integers(1, 64), seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_the_first_pass_lies_up_to_a_step_before_the_level_of_its_row(make: Any, steps: int, seed: int) -> None:
    model = make(first_pass_steps=steps, self_conditioning=1.0).double().train()
    own = batch(seed)
    _, ((before, above), (z, t)) = calls_of(model, own)
    gap = model.schedule.u_of_t(above) - model.schedule.u_of_t(t)
    assert bool((above >= t).all() & (gap <= 1 / steps + 1e-6).all())
    assert float(gap.max()) > 0.05 / steps
    clean = model.embed(own.tokens)
    ratio = (above / t)[:, None, None]
    torch.testing.assert_close(before - clean, ratio * (z - clean))  # the same noise


def test_gaps_are_uniform() -> None:
    model = lively(first_pass_steps=20, self_conditioning=1.0).train()
    gaps: list[Tensor] = []
    for seed in range(60):
        _, ((_, above), (_, t)) = calls_of(model, batch(seed))
        u = model.schedule.u_of_t(t)
        gaps.append((20 * (model.schedule.u_of_t(above) - u))[u < 0.95])
        del model.logits
    found = torch.cat(gaps)
    assert float(found.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(found.var()) == pytest.approx(1 / 12, abs=0.02)


def test_with_very_many_steps_it_is_plain_self_conditioning() -> None:
    plain, _ = calls_of(lively(self_conditioning=1.0).train(), batch())
    many, _ = calls_of(lively(self_conditioning=1.0, first_pass_steps=100_000).train(), batch())
    few, _ = calls_of(lively(self_conditioning=1.0, first_pass_steps=2).train(), batch())
    torch.testing.assert_close(many, plain, rtol=1e-4, atol=1e-5)
    assert abs(float(few - plain)) > abs(float(many - plain))


def test_off_it_draws_nothing_and_on_it_changes_no_other_draw() -> None:
    states = {}
    for steps in (0, 4):
        own = batch()
        _, seen = calls_of(lively(first_pass_steps=steps).train(), own)
        assert own.generator is not None
        states[steps] = seen[-1], own.generator.get_state()
    assert torch.equal(states[0][0][0], states[4][0][0])
    assert torch.equal(states[0][0][1], states[4][0][1])
    assert not torch.equal(states[0][1], states[4][1])


def test_evaluation_makes_it_at_the_level_of_the_row() -> None:
    own = batch()
    loss, ((before, above), (z, t)) = calls_of(lively(first_pass_steps=4).eval(), own)
    assert torch.equal(above, t)
    assert torch.equal(before, z)
    assert float(loss) == float(calls_of(lively().eval(), batch())[0])


def test_no_gradient_goes_through_the_first_pass_or_its_level() -> None:
    model = lively(first_pass_steps=4, self_conditioning=1.0).train()
    z = torch.randn(B, N, model.dim, dtype=torch.float64, requires_grad=True)
    moved, level = model._noisier(z * 0, z, torch.full((B,), 2.0, dtype=torch.float64), batch())
    assert not moved.requires_grad
    assert not level.requires_grad


def test_a_config_from_before_the_setting_loads_without_it(tmp_path: Path) -> None:
    with_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"].pop("first_pass_steps") == 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert loaded(tmp_path).first_pass_steps == 0


@pytest.mark.parametrize("system", [CDCD, LangFlow])
def test_what_has_no_first_pass_is_refused(system: type[CDCD] | type[LangFlow]) -> None:
    with pytest.raises(CdlmError, match="raise self_conditioning"):
        system(first_pass_steps=8, self_conditioning=0.0)
    for value in (-1, 2.5):
        with pytest.raises(CdlmError, match="first_pass_steps"):
            system(first_pass_steps=value)  # type: ignore[arg-type]
