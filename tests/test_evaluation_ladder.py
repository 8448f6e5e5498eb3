"""What the distances must see: real text, then 5, 10, 20 and 40 % of its tokens wrong, then shuffled, in this order."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from evaluation_toys import random_judge

from cdlm.data.sources import Files, Source, Stories
from cdlm.data.store import PackedRows, build_store
from cdlm.data.tokenizer import train_tokenizer
from cdlm.evaluation.judge import Readers
from cdlm.evaluation.ladder import SHARES, corrupted, ladder, rungs
from cdlm.evaluation.metrics.features import NGrams
from cdlm.evaluation.metrics.reference import DISTANCES, Spread
from cdlm.evaluation.texts import Corpus, RealText

FIRST = ["Blue", "Green", "Golden", "Red", "Silver", "Old", "Royal", "Little", "Happy", "Quiet"]
SECOND = ["Spice", "Man", "Palace", "Curry", "Lion", "Mill", "Vaults", "Punter", "Cricketers", "Phoenix", "Wrestlers",
          "Plough", "Rice Boat", "Waterman", "Eagle"]  # fmt: skip
KIND = ["pub", "restaurant", "coffee shop", "bistro", "tavern", "diner"]
FOOD = ["Italian", "French", "Indian", "Chinese", "Japanese", "English", "fast", "Thai", "Greek", "Spanish"]
AREA = ["city centre", "riverside", "old town", "harbour", "market square", "station quarter", "north side"]
NEAR = ["Burger King", "the Crown", "Rainbow Cafe", "the Six Bells", "All Bar One", "Yippee Noodle", "the Bakers",
        "Clare Hall", "Raja Cuisine", "the Portland Arms"]  # fmt: skip
PRICE = ["cheap", "moderate", "high", "less than 20 pounds", "20 to 25 pounds", "more than 30 pounds"]
RATING = ["low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"]
FAMILY = ["is family friendly", "is not for children", "welcomes kids", "is for adults only", "suits families"]
TEMPLATES = [
    "{name} is a {kind} in the {area} near {near}. It serves {food} food at {price} prices and {family}.",
    "Near {near}, in the {area}, you find {name}, a {food} {kind}. Its customer rating is {rating}.",
    "There is a {price} {kind} called {name} that {family}. It has a rating of {rating} and serves {food} food.",
    "The {kind} {name} offers {food} dishes in the {area}. Customers rate it {rating}, and it {family}.",
    "{name} {family}. The {kind} sells {food} food, its price range is {price}, and it lies by {near}.",
]


def restaurants(file: Path) -> Source:
    """Lines about 150 restaurants, sorted by restaurant, each with a kind, an area and a neighbour of its own."""
    draw, lines = np.random.default_rng(0), list[str]()

    def one(parts: list[str]) -> str:
        return parts[draw.integers(len(parts))]

    for first in FIRST:
        for second in SECOND:
            own = {"name": f"The {first} {second}", "kind": one(KIND), "area": one(AREA), "near": one(NEAR)}
            for _ in range(24):
                facts = {"food": one(FOOD), "price": one(PRICE), "rating": one(RATING), "family": one(FAMILY)}
                lines.append(one(TEMPLATES).format(**own, **facts))
    file.write_text("\n".join(lines) + "\n")
    return Files((str(file),))


def real_text(source: Source, vocabulary: int, folder: Path) -> RealText:
    """Its training split in rows of 64 tokens."""
    tokenizer = train_tokenizer(source.documents("train"), vocabulary)
    rows = PackedRows(build_store(source, "train", tokenizer, folder), 64)
    return RealText(rows, None, tokenizer, source)


def in_order(values: list[Spread], worse: float) -> list[bool]:
    """Whether each mean is beyond the one before, in the direction of worse text."""
    return [worse * (after.mean - before.mean) > 0 for before, after in pairwise(values)]


@pytest.mark.parametrize("name", ["stories", "restaurants"])
def test_the_ladder_is_in_order(name: str, tmp_path: Path) -> None:
    source, vocabulary = (Stories(8000), 480) if name == "stories" else (restaurants(tmp_path / "text.txt"), 600)
    pytest.importorskip("mauve", reason="mauve-text is optional")
    found = ladder(real_text(source, vocabulary, tmp_path), 800, NGrams(), Readers(random_judge()), splits=6)
    *steps, salad = found.values()
    assert len(steps) == len(SHARES) + 2
    assert all(in_order([step["frechet"] for step in steps], +1))
    assert all(in_order([step["mauve"] for step in steps], -1))
    real, shuffled = steps[0], steps[-1]
    for floor in (shuffled, salad):
        assert floor["mauve"].mean < 0.1 < 0.9 < real["mauve"].mean
        assert floor["frechet"].mean > 10 * real["frechet"].mean
    assert all(after > before for before, after in zip(real["frechet"].values, steps[1]["frechet"].values, strict=True))


def test_rungs_hold_what_they_say() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 50, (40, 30)).tolist()
    corpus = Corpus("c", tokens, [str(line) for line in tokens])
    for share in SHARES:
        changed = corrupted(corpus, share, str, seed=1)
        assert changed.texts == [str(line) for line in changed.tokens]
        differ = np.mean(np.array(changed.tokens) != np.array(tokens))
        assert differ == pytest.approx(share * 49 / 50, abs=0.04)
    names = [rung.name for rung in rungs(corpus, str, seed=1)]
    assert names == ["real", "5%", "10%", "20%", "40%", "tokens shuffled", "unigram salad"]
    assert set(DISTANCES) == {"mauve", "frechet"}
