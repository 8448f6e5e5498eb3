"""What MAUVE and the Fréchet distance see: real text made worse step by step, under several kinds of features.

Of the documents of each text a third trains the tokenizer's small judge, half are the real text that is split and made
worse, and nobody sees both. Every line is one kind of features; every column is text that is worse than the one before,
see `cdlm.evaluation.ladder`. A good distance falls (MAUVE) or grows (Fréchet) from left to right, by more than ±, its
deviation over the splits.

    python benchmarks/ladder.py stories [e2e_train.txt speeches.jsonl ...] [--n 500] [--splits 5] [--vocab 480 1024 ...]
"""

import argparse
from pathlib import Path

from cdlm.data.sources import Files, Source, Stories
from cdlm.evaluation.judge import Readers
from cdlm.evaluation.ladder import ladder
from cdlm.evaluation.metrics.features import FEATURES
from cdlm.evaluation.small_judge import SmallJudge
from cdlm.evaluation.texts import RealText
from cdlm.runs.config import RunConfig
from cdlm.runs.train import RunText

KINDS = ["NGrams()", "NGrams(over='words')", "MeanState()", "LastState()"]


def source_of(name: str) -> Source:
    """The stories, or a file of texts."""
    return Stories() if name == "stories" else Files((name,))


def real_text(config: RunConfig) -> tuple[RealText, SmallJudge]:
    """The text that is made worse, and a judge that read other documents."""
    text = RunText.of(config)
    judge = SmallJudge(text.judge, text.tokenizer, config.batch_size, Path(config.cache).expanduser() / "judges")
    return RealText(text.valid, text.unread, text.tokenizer, config.source), judge


def main() -> None:
    """Print a table of each text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="stories, or a .txt, .jsonl, .csv or .parquet file")
    parser.add_argument("--n", type=int, default=500, help="texts a side")
    parser.add_argument("--splits", type=int, default=5, help="random splits of the real text")
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024], help="tokens, of all texts or of each")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--features", nargs="+", default=KINDS)
    args = parser.parse_args()
    sizes = args.vocab * (len(args.texts) if len(args.vocab) == 1 else 1)
    for name, vocab in zip(args.texts, sizes, strict=True):
        config = RunConfig(source=source_of(name), vocab_size=vocab, length=args.length, unread_share=0.5)
        text, small = real_text(config)
        readers, count = Readers(small.open()), min(args.n, text.most)
        print(f"\n{Path(name).stem}, {count} texts a side, {args.splits} splits\n", flush=True)
        for number, kind in enumerate(args.features):
            found = ladder(text, count, FEATURES.parse(kind), readers, args.splits)
            if number == 0:
                print(f"| features | distance | {' | '.join(found)} |\n|---|---|{'--:|' * len(found)}")
            for distance in ("mauve", "frechet"):
                cells = (f"{spread[distance].mean:.3f} ± {spread[distance].sd:.3f}" for spread in found.values())
                print(f"| `{kind}` | {distance} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
