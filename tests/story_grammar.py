"""Whether a text is a whole story of the grammar; the package itself only checks sentences."""

from cdlm.data.stories import _PLOTS, Facts, _join, _readings, sentences


def is_story(text: str) -> bool:
    """One plot's sentences in order, every later mention fitting the first."""
    parts = sentences(text)
    if " ".join(parts) != text:
        return False
    return any(len(parts) == len(plot) and _fits(parts, plot, {}) for plot in _PLOTS)


def _fits(parts: list[str], plot: tuple[tuple[str, ...], ...], facts: Facts) -> bool:
    """Whether the sentences can be read as the plot without contradicting the facts."""
    if not parts:
        return True
    for reading in _readings(parts[0], plot[0]):
        if (joined := _join(facts, reading)) is not None and _fits(parts[1:], plot[1:], joined):
            return True
    return False
