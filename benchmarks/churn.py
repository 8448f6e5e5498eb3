"""What does a churn do to the spread of samples, where the denoiser is exact?

Data are standard normal numbers, so that the denoiser is z / (1 + t^2), every step is linear, and the deviation of the
samples is computed and not drawn. Prints the table of docs/churn.md and draws its figure.

    python benchmarks/churn.py docs/images/churn.png
"""

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from cdlm.continuous.grids import UpperEnds
from cdlm.continuous.schedules import LogitNormal
from cdlm.continuous.solvers import Churn

STEPS = (8, 16, 32, 64, 128, 256, 1024)
GAMMA, SCALE = 1.5, 2.0


def spread(solver: Churn | None, levels: Tensor, temperature: Callable[[Tensor], Tensor] = torch.ones_like) -> float:
    """Deviation of the last estimate, from levels t_0 > t_1 > ...

    Args:
        solver: None is Euler.
        temperature: of the score, at a level.
    """
    variance = levels[:1].square()
    for t, t_next in zip(levels.split(1), [*levels[1:].split(1), levels[-1:]], strict=True):
        back, noise = (t, torch.zeros_like(t)) if solver is None else solver.back(t, t_next)
        share = 1 + (1 / (1 + back.square()) - 1) / temperature(back)
        ratio = t_next / back
        kept = 1 / (1 + back.square()) if bool(t_next == t) else share + ratio * (1 - share)
        variance = (variance + noise.square()) * kept.square()
    return float(variance.sqrt())


def same_temperature(wanted: float, levels: Tensor) -> float:
    """The score temperature at which the ODE has that spread."""
    low, high = 0.2, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        below = spread(None, levels, lambda t, to=middle: torch.full_like(t, to)) < wanted
        low, high = (middle, high) if below else (low, middle)
    return low


def limit() -> float:
    """Spread of ELF's churn with ever finer steps over all levels."""
    s, whole = SCALE, 1 + SCALE**2
    return math.exp(-GAMMA * (s**2 / whole * math.log(s) + s / whole * math.pi / 2))


def main(image: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ways = {"Euler": None, 'Churn "exact"': Churn(GAMMA, "exact", SCALE), 'Churn "elf"': Churn(GAMMA, "elf", SCALE)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    print(f"| steps | {' | '.join(ways)} | score temperature of Euler with the last spread |")
    print("|--:" * 5 + "|")
    for steps in STEPS:
        levels = UpperEnds().levels(LogitNormal(noise_scale=SCALE), steps)
        for name, solver in ways.items():
            found[name].append(spread(solver, levels))
        numbers = [found[name][-1] for name in ways]
        shown = " | ".join(f"{number:.3f}" for number in (*numbers, same_temperature(numbers[-1], levels)))
        print(f"| {steps} | {shown} |")
    tau = torch.linspace(1e-4, 1 - 1e-4, 20_000, dtype=torch.float64)
    fine = SCALE * (1 - tau) / tau
    still, exact, elf = (spread(solver, fine) for solver in ways.values())
    steered = spread(None, fine, lambda t: 1 / (1 + GAMMA * SCALE / (SCALE + t)))
    print(f"20,000 equal steps of tau: Euler {still:.4f}, exact {exact:.4f}, elf {elf:.4f}")
    print(f"Euler at temperature 1 / (1 + gamma tau) {steered:.4f}, in closed form {limit():.4f}")
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for (name, line), mark in zip(found.items(), "os^", strict=True):
        axes.plot(STEPS, line, marker=mark, label=name)
    axes.axhline(1, color="grey", linestyle=":", label="the data")
    axes.set(xscale="log", xlabel="steps", ylabel="deviation of the samples", ylim=(0, 1.05))
    axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(image, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1])
