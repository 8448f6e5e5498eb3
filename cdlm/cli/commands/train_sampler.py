"""Train the layer of the policy `Adjust`."""

from __future__ import annotations

from pathlib import Path

from cdlm.api import open_session, sampling_of
from cdlm.cli.groups import PromptOptions, asked, flat_settings
from cdlm.core.devices import DeviceOptions
from cdlm.core.files import check_places
from cdlm.core.progress import meter, to_stderr
from cdlm.masked.joint import ABOUT, Fitter, LayerFitting, layered, trajectories, write_layer
from cdlm.masked.sampler import UnmaskingSettings

PROMPTS, FITTING, MACHINE = PromptOptions(n=512), LayerFitting(), DeviceOptions()
UNMASKING = UnmaskingSettings()


def train_sampler(
    run: str,
    out: Path,
    *,
    batch_size: int | None = None,
    prompts: PromptOptions = PROMPTS,
    fitting: LayerFitting = FITTING,
    unmasking: UnmaskingSettings = UNMASKING,
    machine: DeviceOptions = MACHINE,
) -> None:
    """Train a layer on top of a masked model that makes tokens of one call depend on each other: the policy Adjust.

    The model draws texts, one token a call unless a policy is given, whatever it recommends, and stays as it is.

    Args:
        run: run folder or Hub id of one of our masked models, LLaDA or Dream.
        out: folder to write the layer to, best the run folder of the model.
        batch_size: texts that are drawn at a time; by default as cdlm sample.
    """
    texts = prompts.texts()
    check_places(out / ABOUT)
    shown, settings = not machine.quiet, flat_settings(unmasking)
    with open_session(run, seed=prompts.seed, device=machine.device, progress=shown) as session:
        session = session.with_sampling(sampling_of(session.model, session.model.plain, settings))
        model, sampling = layered(session)
        requests, _ = asked(session, texts, prompts)
        with meter(len(requests), "texts to learn from", shown) as drawn:
            size = batch_size or model.batch_size
            learned = trajectories(model, sampling, requests, size, prompts.seed, drawn.advance)
        with meter(fitting.updates, "updates", shown) as updates:
            layer, report = Fitter(model, fitting, prompts.seed).fit(
                learned, lambda nats: updates.advance(nats_per_token=f"{nats:.4f}")
            )
        write_layer(out, layer, model.need_fingerprint(), fitting, report)
    if shown:
        print("nats per open position between what is said and what the model would say, on held-out texts:")
        for since, (alone, with_layer) in report["kl"].items():
            print(f"{since:>3} tokens later: {alone:.4f} of the call alone, {with_layer:.4f} with the layer")
        to_stderr(f'{out / ABOUT}: {report["parameters"]:,} parameters; try --policy "Adjust({str(out)!r}, 4)"')
