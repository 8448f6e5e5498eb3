"""Laws that hold on a CUDA device: `pytest -m gpu`, which fails where there is none. All other tests are of the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cdlm
from cdlm.cli.main import main
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.core.types import Condition
from cdlm.halting import KL, Criterion, Entropy, Patience
from cdlm.halting.replay import replay
from cdlm.masked.sparse import Kept, flexed, gathered
from cdlm.sampling.recordings import recording_of

pytestmark = pytest.mark.gpu

CONFIG = str(Path(__file__).parents[1] / "configs" / "demo.yaml")
TEXT = ["--source.n", "2000", "--batch_size", "16", "--validation_rows", "16", "--preview", "2"]
TRAINING = ["--training.validate_every", "40", "--training.checkpoint_every", "20", "--training.final_lr_ratio", "1"]


def train(folder: Path, cache: Path, *options: str, steps: int = 80) -> Path:
    words = ["train", "--config", CONFIG, *TEXT, *TRAINING, "--training.steps", str(steps), "--cache", str(cache)]
    main([*words, "--out", str(folder), "--quiet", *options])
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return train(tmp_path_factory.mktemp("run") / "run", cache)


def test_training_takes_the_gpu_and_learns(run: Path, tmp_path: Path, cache: Path, capfd: Any) -> None:
    words = ["train", "--config", CONFIG, *TEXT, "--training.steps", "2", "--cache", str(cache)]
    main([*words, "--out", str(tmp_path / "run")])
    assert "training on cuda" in capfd.readouterr().err
    losses = np.genfromtxt(run / "metrics.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")["loss"]
    losses = losses[np.isfinite(losses)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_is_the_uninterrupted_one(run: Path, tmp_path: Path, cache: Path) -> None:
    cut = train(tmp_path / "cut", cache, steps=40)
    main(["train", "--resume", str(cut), "--training.steps", "80", "--quiet"])
    for name, value in weights(run).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("option", ["--training.precision=bf16", "--training.compile=true"])
def test_other_arithmetic_trains_as_well(option: str, run: Path, tmp_path: Path, cache: Path) -> None:
    other = train(tmp_path / "other", cache, option, steps=20)
    texts = cdlm.generate(cdlm.load(other, device="cuda"), n=4, steps=8, seed=0).texts
    assert len(texts) == 4


WAYS: list[dict[str, Any]] = [
    {}, {"solver": "Ancestral()"}, {"solver": "Heun()"}, {"solver": "Ancestral()", "commit": "Threshold(0.5)"},
    {"grid": "Adaptive(0.1)", "solver": "TwoStep()"}, {"halt": "Entropy(0.5)"}, {"softmax_temperature": 0.8},
]  # fmt: skip


def test_the_network_says_what_it_says_on_the_cpu(run: Path) -> None:
    said = []
    for device in ("cuda", "cpu"):
        model = cdlm.load(run, device=device)
        assert isinstance(model, EmbeddingDiffusion)
        assert model.device.type == device
        source = torch.Generator().manual_seed(0)
        z = torch.randn(4, model.length, model.dim, generator=source).to(device)
        t = torch.tensor([0.5, 2.0, 8.0, 30.0], dtype=torch.float64, device=device)
        open_ = torch.ones(z.shape[:2], dtype=torch.bool, device=device)
        with torch.no_grad():
            logits = model.denoise(z, t, Condition(torch.zeros_like(z), open_, torch.zeros_like(z))).logits
        said.append(logits.float().cpu())
    torch.testing.assert_close(*said, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_samples_are_those_of_the_cpu_but_for_rounding(way: dict[str, Any], run: Path) -> None:
    """The noise is drawn on the CPU for every device. Rounding may tip a token, and with it what comes after."""
    here, there = (
        cdlm.generate(cdlm.load(run, device=name), n=16, steps=16, seed=0, **way) for name in ("cuda", "cpu")
    )
    assert (here.tokens == there.tokens).mean() > 0.97


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_sample_does_not_depend_on_the_batch_but_for_rounding(way: dict[str, Any], run: Path) -> None:
    model = cdlm.load(run, device="cuda")
    together, apart = (cdlm.generate(model, n=8, steps=16, seed=0, batch_size=size, **way) for size in (8, 1))
    assert (together.tokens == apart.tokens).mean() > 0.97


def test_the_same_run_twice_is_the_same_run(run: Path) -> None:
    model = cdlm.load(run, device="cuda")
    first, second = (cdlm.generate(model, n=8, steps=16, seed=0, solver="Ancestral()") for _ in range(2))
    assert np.array_equal(first.tokens, second.tokens)


@pytest.mark.parametrize("rule", [Entropy(0.5), Patience(2), KL(0.1)], ids=str)
def test_a_rule_halts_a_recording_where_it_halts_a_run(rule: Criterion, run: Path) -> None:
    session = cdlm.open_session(cdlm.load(run, device="cuda"), steps=16, batch_size=8)
    requests = session.requests(n=8)
    recording = recording_of(session.recorded().run(requests), session)
    live, replayed = session.with_criterion(rule).run(requests), replay(recording, rule)
    assert np.array_equal(live.nfe, replayed.nfe)
    assert (
        live.tokens == replayed.tokens
    ).mean() > 0.95  # rows that halt leave a smaller batch, which rounds otherwise


def test_flex_attention_is_the_gathered_one() -> None:
    """Of every block size that the papers name, with empty slots and rows that keep fewer blocks."""
    noise = torch.Generator().manual_seed(0)
    for size in (16, 32, 128):
        q, k, v = (torch.randn(2, 4, 6 * size, 64, generator=noise).cuda() for _ in range(3))
        filled = torch.ones(2, 6 * size, dtype=torch.bool).cuda()
        filled[1, 5 * size - 3 :] = False
        blocks = torch.rand(2, 4, 6, 5, generator=noise).argsort(-1)[..., :3].int().cuda()
        kept = Kept(blocks, torch.tensor([3, 2]).cuda(), filled, False, size)
        torch.testing.assert_close(flexed(q, k, v, kept, 0.125), gathered(q, k, v, kept, 0.125), rtol=1e-2, atol=1e-2)
