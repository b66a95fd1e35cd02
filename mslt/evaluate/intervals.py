"""How sure a share of right answers is, and how sure the difference of two on the same questions: 95 % intervals.

R rows, W windows of text.
"""

import base64
import math

import numpy as np

Z_95 = 1.959964


def wilson(share: float, count: int) -> tuple[float, float]:
    """Of a share of `count` rows (Wilson 1927)."""
    z2 = Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def clustered(right_W: np.ndarray, asked_W: np.ndarray) -> tuple[float, float]:
    """Of the share that is right of what was asked, where the windows are what was drawn, not their tokens (the ratio
    estimator of Cochran 1977, section 2.11)."""
    share = right_W.sum() / asked_W.sum()
    half = Z_95 * math.sqrt(((right_W - share * asked_W) ** 2).sum()) / asked_W.sum()
    return max(float(share - half), 0.0), min(float(share + half), 1.0)


def paired(ours_R: np.ndarray, theirs_R: np.ndarray) -> tuple[float, float]:
    """Of the mean difference of what two had right of each row: 0 to 1 where a row was asked several times."""
    difference_R = ours_R - theirs_R
    mean, half = difference_R.mean(), Z_95 * difference_R.std(ddof=1) / math.sqrt(len(difference_R))
    return float(mean - half), float(mean + half)


def packed(right_R: np.ndarray) -> str:
    """Which rows were right, a bit for each, in base64."""
    return base64.b64encode(np.packbits(right_R).tobytes()).decode()


def unpacked(text: str, num_rows: int) -> np.ndarray:
    """[R]. ValueError where the text is of fewer rows, or is none of ours."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8), count=num_rows).astype(bool)
