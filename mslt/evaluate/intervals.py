"""How sure a share of right answers is, and how sure the difference of two on the same questions: 95 % intervals.

U units that were drawn, as sentences or whole passages, R rows, S repetitions.
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


def clustered(right_U: np.ndarray, asked_U: np.ndarray) -> tuple[float, float]:
    """Of the share that is right of all that was asked, some of each unit (the ratio estimator of Cochran 1977, section
    2.11). 0 to 1 of one unit, of which nothing is known."""
    if len(asked_U) < 2:
        return 0.0, 1.0
    share = float(right_U.sum() / asked_U.sum())
    half = Z_95 * math.sqrt(_variance(right_U - share * asked_U, asked_U))
    return max(share - half, 0.0), min(share + half, 1.0)


def paired(ours_SU: np.ndarray, theirs_SU: np.ndarray, asked_U: np.ndarray) -> tuple[float, float]:
    """Of the difference of two such shares: what the drawn units leave open, and the repetitions, where there are
    several. -1 to 1 of one unit."""
    if len(asked_U) < 2:
        return -1.0, 1.0
    difference_SU = ours_SU.astype(float) - theirs_SU
    share_S = difference_SU.sum(1) / asked_U.sum()
    mean = float(share_S.mean())
    variance = _variance(difference_SU.mean(0) - mean * asked_U, asked_U)
    if len(share_S) > 1:
        variance += share_S.var(ddof=1) / len(share_S)
    half = Z_95 * math.sqrt(variance)
    return mean - half, mean + half


def _variance(residual_U: np.ndarray, asked_U: np.ndarray) -> float:
    """Of a share, from what its units are off it."""
    return float(len(asked_U) / (len(asked_U) - 1) * (residual_U**2).sum() / asked_U.sum() ** 2)


def packed(right_R: np.ndarray) -> str:
    """Which rows were right, a bit for each, in base64."""
    return base64.b64encode(np.packbits(right_R).tobytes()).decode()


def unpacked(text: str, num_rows: int) -> np.ndarray:
    """[R]. ValueError where the text is of another number of rows, or is none of ours."""
    bits = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(bits) != -(-num_rows // 8):
        raise ValueError(f"{len(bits)} bytes are not {num_rows} rows")
    return np.unpackbits(bits, count=num_rows).astype(bool)
