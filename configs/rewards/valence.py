# SPDX-License-Identifier: Apache-2.0
"""Happy stories: how positive the words of a completion are, by the VADER lexicon.

    reward: configs/rewards/valence.py:valence

The lexicon (MIT, C.J. Hutto) is read from $JAXRLHF_ASSETS/data/vader/vader_lexicon.txt, by default
from `shared` beside the project.
"""

import functools
import os
import string
from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"


@functools.cache
def lexicon() -> dict[str, float]:
    """{word: mean rating in [-4, 4]}: columns 1 and 2 of the lexicon."""
    assets = Path(os.environ.get("JAXRLHF_ASSETS") or SHARED)
    path = assets / "data" / "vader" / "vader_lexicon.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: set JAXRLHF_ASSETS to the folder with data/vader")
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {row[0]: float(row[1]) for row in rows if len(row) >= 2}


def valence(prompts, completions, **columns) -> list[float]:
    """Sum of the lexicon's means over a completion's words / its number of words; 0 if none.

    Words: split on white space, ASCII punctuation stripped at both ends, lower-case, empties
    dropped. The prompt does not count.
    """
    means = lexicon()
    scores = []
    for completion in completions:
        stripped = (word.strip(string.punctuation).lower() for word in completion.split())
        words = [word for word in stripped if word]
        scores.append(sum(means.get(word, 0.0) for word in words) / len(words) if words else 0.0)
    return scores
