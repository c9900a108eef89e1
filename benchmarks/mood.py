"""Mood of a story, a reward that is exact: --reward benchmarks/mood.py:mood

Positive minus negative words of the opinion lexicon of Hu and Liu (2004), read from
../shared/data/opinion_lexicon.json, which is not in this repository. The environment variable
MOOD_LEXICON overrides the path."""

import json
import os
import re
from pathlib import Path

LEXICON = Path(__file__).parents[2] / "shared/data/opinion_lexicon.json"


def words(text):
    return re.findall(r"[a-z][a-z'+-]*", text.lower())


def mood(prompts, completions, rows):
    """Positive minus negative words of each completion."""
    lexicon = json.loads(Path(os.environ.get("MOOD_LEXICON", LEXICON)).read_text())
    signs = dict.fromkeys(lexicon["positive"], 1.0) | dict.fromkeys(lexicon["negative"], -1.0)
    return [sum(signs.get(word, 0.0) for word in words(text)) for text in completions]
