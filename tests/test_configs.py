"""The settings files that ship."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdlm.continuous.systems.cdcd import CDCD
from cdlm.continuous.systems.langflow import LangFlow
from cdlm.continuous.systems.plaid import Plaid
from cdlm.data.sources import Files, Stories
from cdlm.models.system import SystemConfig
from cdlm.runs.config import RunConfig, parse_run, read_run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_is_a_run_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = parse_run(["--config", str(path)])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert read_run(tmp_path) == config


PATHS = st.text(min_size=1).filter(lambda text: "\0" not in text)


@given(
    path=st.sampled_from(CONFIGS),
    top=st.fixed_dictionaries({}, optional={
        "tokenizer": PATHS, "cache": PATHS, "vocab_size": st.integers(1, 2**31), "length": st.integers(100, 10**9),
        "workers": st.integers(0, 9), "rows": st.sampled_from(["pack", "document", "filled"]),
    }),
    paths=st.lists(PATHS, max_size=3),
    training=st.fixed_dictionaries({}, optional={
        "steps": st.integers(1, 10**12), "lr": st.floats(0, 10), "clip": st.floats(1e-6), "ema": st.floats(0, 0.9999),
        "seed": st.integers(0, 2**63 - 1), "compile": st.booleans(), "loggers": st.just(("wandb", "tensorboard")),
    }),
)  # fmt: skip
@settings(max_examples=60)
def test_settings_survive_the_way_through_yaml(
    path: Path, top: dict[str, Any], paths: list[str], training: dict[str, Any]
) -> None:
    shipped = shipped_config(path)
    if paths:
        top["source"] = Files(tuple(paths), field=paths[0])
    config = replace(shipped, training=replace(shipped.training, **training), **top)
    assert parse_run(["--config", config.to_yaml()]) == config


@cache
def shipped_config(path: Path) -> RunConfig:
    return parse_run(["--config", str(path)])


def test_a_file_names_no_module_of_ours() -> None:
    """Modules may move between versions; classes keep their names."""
    assert "cdlm." not in RunConfig(system=Plaid()).to_yaml()


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("{class_path: cdlm.continuous.cdcd.CDCD, init_args: {own_position: true, dim: 8}}",
         CDCD(output_prior=True, dim=8)),
        ("{class_path: cdlm.continuous.plaid.Plaid, init_args: {own_position_warmup: 9}}",
         Plaid(output_prior_warmup=9)),
        ("{class_path: LangFlow, init_args: {own_position: false, own_position_warmup: 3}}",
         LangFlow(output_prior=False, output_prior_warmup=3)),
        ("{own_position: true}", CDCD(output_prior=True)),
    ],
)  # fmt: skip
def test_the_settings_of_an_earlier_version_are_read(system: str, expected: Any, tmp_path: Path) -> None:
    source = "{class_path: cdlm.data.corpora.Stories, init_args: {n: 7}}"
    (tmp_path / "config.yaml").write_text(f"system: {system}\nsource: {source}\ntraining: {{lr: 1.0e-3, steps: 5}}\n")
    config = read_run(tmp_path)
    assert (config.system, config.source) == (expected, Stories(n=7))
    assert (config.training.lr, config.training.steps) == (1e-3, 5)


def test_a_class_of_a_users_own_stands_there_with_its_module() -> None:
    assert f"class_path: {__name__}.Mine" in RunConfig(system=Mine()).to_yaml()


@dataclass(frozen=True)
class Mine(CDCD):
    """A system that no registry lists."""


def test_the_published_size_is_the_published_size() -> None:
    config = parse_run(["--config", str(Path(CONFIGS[0]).parent / "ddlm.yaml")])
    assert isinstance(config.system, CDCD)
    assert (config.system.width, config.system.depth, config.system.dim) == (1024, 8, 256)
    assert (config.system.t_min * 16, config.system.t_max * 16) == (1, 300)


def test_the_command_line_wins_over_the_file() -> None:
    config = parse_run(["--config", str(CONFIGS[0]), "--training.steps", "7", "--system.depth", "9"])
    assert (config.training.steps, config.system.depth) == (7, 9)


def test_a_system_that_is_named_has_its_own_defaults() -> None:
    """Not those of CDCD, the default, for the settings that both have."""
    assert parse_run(["--system", "Plaid", "--system.width", "256"]).system == Plaid(width=256)
    config = parse_run(["--config", str(CONFIGS[0].parent / "langflow.yaml")])
    assert config.system == LangFlow(width=128, depth=3, heads=4, dim=64, gates=False)


COMMITTING = {"steps": 64, "solver": "Ancestral()", "commit": "Threshold(0.9)"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_commits_are_recommended_where_they_were_measured_to_help(path: Path) -> None:
    helped = path.stem in {"ddlm", "demo", "e2e", "langflow", "speeches"}
    assert parse_run(["--config", str(path)]).preset == (COMMITTING if helped else {})


@pytest.mark.parametrize("system", [CDCD(), LangFlow()])
def test_they_are_not_where_the_masks_do_not_teach_them(system: SystemConfig) -> None:
    for masking in ("Prefix()", "Unconditional()", "Completion()", "Mixture(((1.0, Prefix()),))"):
        assert RunConfig(system=system, masking=masking).preset == {}
    assert RunConfig(system=system, masking="RandomSubset()").preset == COMMITTING


def test_they_are_not_of_a_network_that_takes_given_tokens_for_noisy_ones() -> None:
    assert RunConfig(system=LangFlow(network="released", dim=128)).preset == {}
