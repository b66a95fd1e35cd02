"""A folder of probing tasks in SentEval's format, made up, and an encoder's words to make them of."""

import random
from pathlib import Path

from tests.encoders import WORDS


def sentence(draw: random.Random, length: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(length))


def write_probing(folder: Path, num_train: int = 120, num_heldout: int = 40, seed: int = 0) -> Path:
    """Tense (good or sad stands in it), BigramShift (nothing to know)."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for file, labels in (("past_present.txt", ("PAST", "PRES")), ("bigram_shift.txt", ("I", "O"))):
        lines = []
        for split, count in (("tr", num_train), ("va", num_heldout), ("te", num_heldout)):
            for index in range(count):
                label = labels[index % 2]
                word = {"PAST": "sad", "PRES": "good"}.get(label, draw.choice(WORDS))
                lines.append(f"{split}\t{label}\t{word} the {word} {word} {sentence(draw, draw.randint(2, 6))}\n")
        (folder / file).write_text("".join(lines))
    return folder
