"""The settings files that ship."""

from pathlib import Path

import pytest

from cdlm.continuous.systems.cdcd import CDCD
from cdlm.continuous.systems.langflow import LangFlow
from cdlm.continuous.systems.plaid import Plaid
from cdlm.runs.config import parse_run, read_run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_is_a_run_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = parse_run(["--config", str(path)])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert read_run(tmp_path) == config


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
