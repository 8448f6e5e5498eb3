"""Adapters: what is trained and what stays, peft's files, the map of updates, resuming, merging, and bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from foreign import TEXT, copy_of, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdlm import api
from cdlm.cli import main as cli
from cdlm.core.errors import CdlmError
from cdlm.core.tensors import read_header
from cdlm.core.types import Batch
from cdlm.data.sources import Files, Stories
from cdlm.halting import EDIT
from cdlm.halting.update_map import FILE, read_map
from cdlm.masked.checkpoints.model import ForeignModel, open_checkpoint
from cdlm.masked.checkpoints.tuned import TunedForeign
from cdlm.masked.system import Masked, MaskedDiffusion
from cdlm.models import lora
from cdlm.models.lora import CONFIG, EPS, WEIGHTS, LoraSettings, read_adapter
from cdlm.models.system import row_cross_entropy
from cdlm.runs.config import RunConfig, read_run
from cdlm.runs.train import train
from cdlm.sampling.session import Model
from cdlm.training.folder import checkpoint_of
from cdlm.training.options import TrainOptions

SIZE: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "dim": 8}
OPTIONS = TrainOptions(
    steps=4, accelerator="cpu", warmup=1, checkpoint_every=2, validate_every=4, log_every=1, optimizer="adamw", lr=1e-2,
    ema=0.5,
)  # fmt: skip
LORA = LoraSettings(rank=3, alpha=8.0, dropout=0.25)
Settings = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(**changes: Any) -> RunConfig:
        given = dict(
            source=Stories(n=60), system=Masked(**SIZE), vocab_size=300, length=16, batch_size=4, validation_rows=8,
            preview=0, cache=cache, training=OPTIONS,
        )  # fmt: skip
        return RunConfig(**{**given, **changes})

    return make


@pytest.fixture(scope="module")
def base(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of our own."""
    out = tmp_path_factory.mktemp("base") / "run"
    train(settings(training=replace(OPTIONS, steps=2)), out, progress=False)
    return out


@pytest.fixture(scope="module")
def adapter(settings: Settings, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of it."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    train(settings(), out, start=base, lora=LORA, progress=False)
    return out


@pytest.fixture(scope="module", params=["llada", "Dream"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaDA or Dream with a tokenizer."""
    folder = copy_of(request.param, tmp_path_factory.mktemp(request.param) / "model")
    write_tokenizer(folder, request.param)
    return folder


def logits(model: Model, tokens: Tensor) -> Tensor:
    assert isinstance(model, MaskedDiffusion | ForeignModel)
    with torch.no_grad():
        return model.logits(tokens)


def some_tokens(count: int = 12, most: int = 100) -> Tensor:
    return torch.arange(2 * count).view(2, count) * 7 % most


# --- what is trained ---


def test_only_the_adapter_is_trained(base: Path, adapter: Path) -> None:
    plain, tuned = (load_file(folder / name) for folder, name in ((base, "model.safetensors"), (adapter, WEIGHTS)))
    model = api.load(adapter)
    assert isinstance(model, MaskedDiffusion)
    state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in plain.items())
    layers = [f"base_model.model.blocks.{i}.qkv.lora_{half}.weight" for i in range(2) for half in "AB"]
    assert sorted(tuned) == sorted(layers)
    assert all(bool(value.any()) for value in tuned.values())  # B begins as zero
    assert [tuple(tuned[name].shape) for name in layers[:2]] == [(3, 16), (48, 3)]
    tokens = some_tokens()
    assert not torch.allclose(logits(model, tokens), logits(api.load(base), tokens), equal_nan=True)


def test_an_untrained_adapter_changes_nothing_and_draws_nothing(base: Path) -> None:
    one, two = api.load(base), api.load(base)
    assert isinstance(two, MaskedDiffusion)
    before = torch.random.get_rng_state()
    two.adapt(LoraSettings(2), "base", "tensors:x", seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits(one, some_tokens()), logits(two.eval(), some_tokens()))
    assert {id(p) for p in two.parameters() if p.requires_grad} == {id(p) for p in two.parameter_groups()["matrices"]}


def test_checkpoints_do_without_the_frozen_weights(adapter: Path, base: Path) -> None:
    kept = torch.load(checkpoint_of(adapter), weights_only=True)["state_dict"]
    assert {name.split(".")[-2] for name in kept if name.endswith("weight")} == {"default"}
    assert not (adapter / "model.safetensors").exists()
    assert not (adapter / "config.json").exists()


# --- peft's files ---


def test_peft_opens_the_adapter_on_the_same_network(base: Path, adapter: Path, tmp_path: Path) -> None:
    plain = api.load(base)
    assert isinstance(plain, MaskedDiffusion)
    opened = peft.PeftModel.from_pretrained(plain.network, str(adapter)).eval()
    assert torch.equal(logits(plain, some_tokens()), logits(api.load(adapter), some_tokens()))
    opened.save_pretrained(str(tmp_path))
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (adapter, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    mine, written = (json.loads((folder / CONFIG).read_text()) for folder in (adapter, tmp_path))
    assert {n for n in mine if mine[n] != written.get(n)} <= {"auto_mapping", "task_type", "inference_mode"}
    assert (mine["r"], mine["lora_alpha"], mine["base_model_name_or_path"]) == (3, 8.0, str(base))


# --- the map ---


def test_after_one_step_the_directions_are_signs(settings: Settings, base: Path, tmp_path: Path) -> None:
    """m = 0.1 g and v = 0.01 g^2, so that U = sign(g) wherever g is far from AdamW's eps."""
    once = settings(training=replace(OPTIONS, steps=1))
    train(once, tmp_path / "run", start=base, lora=LoraSettings(2), progress=False)
    found = read_map(tmp_path / "run")[0]
    assert found.steps == 1
    assert sorted(found.directions) == [f"blocks.{i}.qkv.lora_B.default" for i in range(2)]
    for value in found.directions.values():
        assert bool((value.abs() < 1 + 1e-4).all())
        assert float((value.abs() > 0.99).float().mean()) > 0.9


def test_the_map_is_the_mean_over_the_logged_steps() -> None:
    network = nn.Sequential(nn.Linear(3, 4, bias=False))
    settled = LoraSettings(2, modules=("0",)).settled(network)
    lora.adapt(network, settled)
    made = lora.Adapter(settled, "base", "tensors:x", network)
    assert made.update_map(network) is None
    (b,) = (p for name, p in network.named_parameters() if "lora_B" in name)
    moments = [(torch.randn(4, 2), torch.rand(4, 2)) for _ in range(3)]
    for m, v in moments:
        made.observe(network, {b: {"exp_avg": m, "exp_avg_sq": v}})
    wanted = sum(m / (v.sqrt() + EPS) for m, v in moments) / 3
    found = made.update_map(network)
    assert found is not None
    assert found.steps == 3
    assert torch.allclose(found.directions["0.lora_B.default"], torch.as_tensor(wanted), atol=1e-5)


def test_the_rule_takes_the_map_with_its_adapter_and_no_other(
    base: Path, adapter: Path, settings: Settings, tmp_path: Path
) -> None:
    rule, model = EDIT(str(adapter), delta=100.0, span=1), api.load(adapter)
    samples = api.generate(model, n=3, policy="LLaDA(16, block=8)", temperature=0.0, halt=rule)
    assert (samples.nfe < 16).all()
    with pytest.raises(CdlmError, match=r"has no module 'blocks.0.qkv.lora_B.default'"):
        api.generate(api.load(base), n=1, halt=rule)
    train(settings(), tmp_path / "other", start=base, lora=replace(LORA, rank=2), progress=False)
    with pytest.raises(CdlmError, match="was made with other weights than these"):
        api.generate(api.load(tmp_path / "other"), n=1, halt=rule)
    train(settings(), tmp_path / "mlp", start=base, lora=LoraSettings(2, modules=("attention_out",)), progress=False)
    with pytest.raises(CdlmError, match=r"has no module 'blocks.0.attention_out.lora_B.default'"):
        api.generate(model, n=1, halt=EDIT(str(tmp_path / "mlp")))


# --- resuming ---


def test_a_resumed_run_is_the_uninterrupted_one(
    settings: Settings, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(settings(training=replace(OPTIONS, steps=2, final_lr_ratio=1.0)), run, start=base, lora=LORA, progress=False)
    whole = tmp_path / "whole"
    longer = settings(training=replace(OPTIONS, final_lr_ratio=1.0))
    train(longer, whole, start=base, lora=LORA, progress=False)
    train(longer, run, resume=True, progress=False)
    for name in (WEIGHTS, FILE, CONFIG):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert read_map(run)[0].steps == 4
    again = train(longer, run, resume=True, progress=False)  # it is finished, and only read
    assert torch.equal(logits(again, some_tokens()), logits(api.load(run), some_tokens()))
    assert read_run(run) == longer.__class__(**{**vars(longer), "vocab_size": read_run(run).vocab_size})


def test_a_run_on_another_base_is_not_resumed(settings: Settings, base: Path, tmp_path: Path) -> None:
    moved, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base, moved)
    train(settings(), run, start=moved, lora=LORA, progress=False)
    file = moved / "model.safetensors"
    save_file({name: value + 1.0 for name, value in load_file(file).items()}, file)
    more = settings(training=replace(OPTIONS, steps=5))
    with pytest.raises(CdlmError, match=r"cannot resume: base changed"):
        train(more, run, resume=True, progress=False)
    with pytest.raises(CdlmError, match=r"trained on other weights than those of .*: name its base"):
        api.load(run)


# --- merging ---


def test_a_merged_adapter_is_a_plain_model(adapter: Path, base: Path, settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    cli.main(["merge", str(adapter), str(out), "--quiet"])
    merged, apart = api.load(out), api.load(adapter)
    assert isinstance(merged, MaskedDiffusion)
    assert merged.state_dict().keys() == load_file(base / "model.safetensors").keys()
    tokens = some_tokens()
    one, two = (logits(model, tokens) for model in (merged, apart))
    assert torch.allclose(one[one.isfinite()], two[two.isfinite()], atol=1e-5)
    assert read_run(out) == read_run(adapter)
    train(settings(training=replace(OPTIONS, steps=1)), tmp_path / "more", start=out, progress=False)


# --- LLaDA and Dream ---


def foreign_run(settings: Settings, folder: Path, **changes: Any) -> RunConfig:
    for name in ("train", "valid"):
        (folder / f"{name}.txt").write_text((TEXT * 6 + "\n\n") * 20)
    source = Files(paths=(str(folder / "train.txt"),), valid_paths=(str(folder / "valid.txt"),))
    given = {"source": source, "system": Masked(), "judge_share": 0.0, "unread_share": 0.0, "preview": 1}
    return settings(**{**given, **changes})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, of transformers
def test_an_adapter_of_a_foreign_model(settings: Settings, foreign: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = foreign_run(settings, tmp_path, training=replace(OPTIONS, steps=2))
    train(config, run, start=foreign, lora=LoraSettings(2), progress=False)
    train(replace(config, training=replace(OPTIONS, steps=3)), run, resume=True, progress=False)
    assert len(read_map(run)[0].directions) == 6
    tuned, plain = api.load(run), api.load(foreign)
    assert isinstance(plain, ForeignModel)
    assert tuned.folder == run
    bare = logits(plain, some_tokens())
    peft.PeftModel.from_pretrained(plain.network, str(run)).eval()
    assert torch.equal(logits(plain, some_tokens()), logits(tuned, some_tokens()))
    assert not torch.equal(bare, logits(tuned, some_tokens()))
    api.load(run, precision="bf16")  # the base is known by its files, not by what it is loaded in
    samples = api.generate(
        tuned, ["the cat"], new_tokens=8, policy="LLaDA(block=8)", temperature=0.0,
        halt=EDIT(str(run), delta=1e3, span=1),
    )  # fmt: skip
    assert samples.nfe.tolist() == [4]
    api.merge(run, tmp_path / "merged")
    merged = api.load(tmp_path / "merged")
    written, given = (read_header(folder / "model.safetensors") for folder in (tmp_path / "merged", foreign))
    assert written.specs == given.specs
    assert torch.allclose(logits(merged, some_tokens()), logits(tuned, some_tokens()), atol=1e-4)


def test_the_objective_of_a_foreign_model_is_the_bound(foreign: Path) -> None:
    model = open_checkpoint(foreign, dtype="fp32")
    system = TunedForeign(model, flat=True).eval()
    tokens = torch.randint(0, 100, (5, 10), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(10) < torch.tensor([10, 10, 10, 10, 7])[:, None]
    target = valid & (torch.arange(10) > 2)
    batch = Batch(tokens, valid, target, torch.Generator().manual_seed(3), torch.linspace(0.1, 0.9, 5))
    with torch.no_grad():
        found = system(batch)
    coin = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3))
    masked = target & (coin < found.t.float()[:, None])
    whole = model.logits(tokens.masked_fill(masked, model.constants.mask_id), valid)
    if model.constants.shift:
        whole = torch.cat([whole[:, :1], whole[:, :-1]], 1)
    nats, _ = row_cross_entropy(whole, tokens, masked)
    assert torch.allclose(found.nats.double(), nats.double() / found.t / target.sum(1), rtol=1e-5)
    assert float(found.total) == pytest.approx(float((nats / found.t).sum() / target.sum()), rel=1e-5)


def test_a_foreign_model_itself_is_not_trained(settings: Settings, foreign: Path, tmp_path: Path) -> None:
    config = foreign_run(settings, tmp_path)
    with pytest.raises(CdlmError, match=r"of which an adapter can be trained: give --lora RANK"):
        train(config, tmp_path / "run", start=foreign, progress=False)
    with pytest.raises(CdlmError, match=r"rows of 99 are longer than .* was made for, 64: lower length"):
        train(replace(config, length=99), tmp_path / "run", start=foreign, lora=LORA, progress=False)


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rank": 0}, "rank >= 1"), ({"alpha": 0.0}, "alpha > 0"), ({"dropout": 1.0}, "dropout < 1"),
        ({"modules": ("a*b",)}, "names of modules"), ({"modules": ()}, "names of modules"),
        ({"alpha": math.nan}, "alpha > 0"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CdlmError, match=why):
        LoraSettings(**changes)


def test_a_layer_that_there_is_not_is_named(settings: Settings, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match=r"LoRA adapts q_proj, and the network has no linear layer .*: it has .*qkv"):
        train(settings(), tmp_path / "run", start=base, lora=LoraSettings(2, modules=("qkv", "q_proj")), progress=False)
    with pytest.raises(CdlmError, match="LoRA has rank 17, and no matrix that it adapts has more than 16: lower it"):
        train(settings(), tmp_path / "run", start=base, lora=LoraSettings(17), progress=False)
    for optimizer in ({"optimizer": "muon"}, {"strategy": "fsdp"}):
        options = replace(OPTIONS, **optimizer)
        with pytest.raises(CdlmError, match="an adapter is trained by AdamW on whole copies"):
            train(settings(training=options), tmp_path / "run", start=base, lora=LORA, progress=False)
    with pytest.raises(CdlmError, match="say which, with start"):
        train(settings(), tmp_path / "run", lora=LORA, progress=False)
    assert not (tmp_path / "run" / CONFIG).exists()


DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type 'IA3', expected 'LORA'"), ({"use_dora": True}, "use_dora True"),
    ({"modules_to_save": ["output"]}, "modules_to_save"), ({"r": 0}, "'r'"), ({"r": 5}, "no half of LoRA of rank 5"),
    ({"lora_alpha": "x"}, "lora_alpha"), ({"target_modules": "(a+)+"}, "target_modules"),
    ({"target_modules": ["(a+)+"]}, "names of modules"), ({"target_modules": ["attention_out"]}, "does not fit"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    ({"base_model_name_or_path": "/no/such/folder"}, "is not a model folder"), ({"lora_bias": True}, "lora_bias"),
    ({"rank_pattern": {"qkv": 9}}, "rank_pattern"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "why"), DAMAGE, ids=str)
def test_damaged_settings_are_one_line(adapter: Path, tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))
    with pytest.raises(CdlmError, match=why) as raised:
        api.load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["cut", "another name", "another shape", "nan", "integers", "of peft", "gone"])
def test_damaged_tensors_are_one_line(adapter: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    tensors, about = load_file(folder / WEIGHTS), read_header(folder / WEIGHTS).metadata
    name = sorted(tensors)[0]
    changed: dict[str, dict[str, Tensor]] = {
        "another name": {n.replace("blocks.0", "blocks.7"): v for n, v in tensors.items()},
        "another shape": tensors | {name: tensors[name][:, :4].contiguous()},
        "nan": tensors | {name: tensors[name] * math.nan}, "integers": tensors | {name: tensors[name].long()},
    }  # fmt: skip
    save_file(changed.get(damage, tensors), folder / WEIGHTS, {} if damage == "of peft" else about)
    if damage == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    if damage == "gone":
        (folder / WEIGHTS).unlink()
    with pytest.raises(CdlmError) as raised:
        api.load(folder)
    assert "\n" not in str(raised.value)
    assert {"of peft": "which weights it adapts", "nan": "no numbers"}.get(damage, "copy") in str(raised.value)


def test_an_adapter_of_another_base_is_refused(adapter: Path, settings: Settings, tmp_path: Path) -> None:
    other, folder = tmp_path / "other", tmp_path / "adapter"
    train(settings(training=replace(OPTIONS, steps=3)), other, progress=False)
    shutil.copytree(adapter, folder)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": str(other)}))
    with pytest.raises(CdlmError, match=rf"trained on other weights than those of {other}: name its base") as raised:
        api.load(folder)
    assert "\n" not in str(raised.value)
    (folder / CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": str(adapter)}))
    with pytest.raises(CdlmError, match="which is an adapter itself"):
        api.load(folder)


def test_mistakes_on_the_command_line(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    for words, why in (
        (["train", "--start", base, "--lora-alpha", "3", "--out", out], "--lora-alpha is of an adapter"),
        (["train", "--lora", "3", "--out", out], "say which, with start"),
        (["train", "--start", base, "--lora", "x", "--out", out], "invalid int value"),
        (["train", "--start", base, "--lora", "-1", "--out", out], "rank >= 1"),
        (["train", "--resume", adapter, "--lora", "3"], "leave out --lora"),
        (["train", "--start", adapter, "--lora", "3", "--out", out], "merge it into its base"),
        (["train", "--start", base, "--lora", "3", "--optimizer", "muon", "--out", out], "by AdamW"),
        (["merge", base, out], "holds no adapter"),
        (["merge", adapter, base], "is there already"),
        (["sample", base, "--halt", f"EDIT({str(base)!r})"], f"has no {FILE}"),
        (["sample", base, "--halt", f"EDIT({str(adapter)!r})"], "has no module"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main([str(word) for word in words])
        said = capsys.readouterr().err
        assert caught.value.code == 2
        assert why in said, said
        assert said.count("\n") == 1 or "device" in said
    assert not Path(out).exists()


def test_the_command_line_says_the_size_of_the_map(
    base: Path, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(settings(training=replace(OPTIONS, steps=1)).to_yaml())
    words = ["train", "--config", config, "--start", base, "--lora", "2", "--out", tmp_path / "run"]
    cli.main([str(word) for word in words])
    said = capsys.readouterr().err
    assert f"an adapter of {2 * (16 + 48) * 2:,} numbers on {base}" in said
    assert f"{FILE}: 2 matrices of {2 * 48 * 2 * 4:,} bytes" in said
    assert read_adapter(tmp_path / "run").settings == LoraSettings(2, 4.0, 0.0, ("qkv",))
