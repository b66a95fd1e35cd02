"""Which of the ranks that failed is named."""

import errno
from pathlib import Path

import pytest

from mslt import failures
from mslt.errors import MsltError
from mslt.failures import first_failure, forget_failures, in_words, kind_of, note_failure, noting_failures


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(failures.time, "time", lambda: now[0])
    return now


def note(folder: Path, rank: int, error: Exception) -> None:
    note_failure(folder, rank, "stage 1, step 7", in_words(error), kind_of(error))


CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.2]")


def test_the_first_that_lost_no_peer_is_named(tmp_path: Path, clock: list[float]) -> None:
    note(tmp_path, 0, CLOSED)
    clock[0] = 1001.0
    note(tmp_path, 3, OSError(errno.ENOSPC, "No space left on device"))
    clock[0] = 1002.0
    note(tmp_path, 2, ValueError("of another kind"))
    found = first_failure(tmp_path, 6)
    assert found is not None
    assert (found.rank, found.kind) == (3, "mistake")
    assert str(found).endswith("stage 1, step 7: [Errno 28] No space left on device")


def test_where_all_lost_a_peer_the_earliest_is_named(tmp_path: Path, clock: list[float]) -> None:
    for rank, at in ((0, 1003.0), (1, 1002.0)):
        clock[0] = at
        note(tmp_path, rank, CLOSED)
    found = first_failure(tmp_path, 6)
    assert found is not None
    assert (found.rank, found.kind) == (1, "peer")
    assert str(found).endswith(
        "stage 1, step 7: RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.2]"
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MsltError("another process is training: timed out"), "mistake"),
        (OSError(errno.EROFS, "read-only"), "mistake"),
        (PermissionError(errno.EACCES, "for a moment, over a network"), "error"),
        (OSError(errno.EIO, "of a disk"), "error"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "peer"),
        (RuntimeError("NCCL error: remote process exited"), "peer"),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), "peer"),
        (ValueError("a shape"), "error"),
    ],
)
def test_what_starting_again_mends(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def test_of_the_last_start_each_host_forgets_its_own(tmp_path: Path) -> None:
    for rank in range(4):
        note(tmp_path, rank, ValueError("before"))
    forget_failures(tmp_path, range(2, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-00000.failed.json", "rank-00001.failed.json"]
    assert first_failure(tmp_path, 0) is None, "of a larger world"
    forget_failures(tmp_path, range(2))
    assert first_failure(tmp_path, 6) is None


def test_nothing_is_written_where_there_is_no_run(tmp_path: Path) -> None:
    note(tmp_path / "none", 0, ValueError("early"))
    assert not (tmp_path / "none").exists()
    assert first_failure(tmp_path / "none", 6) is None


def test_what_is_raised_is_noted_with_what_the_rank_was_at(tmp_path: Path) -> None:
    def fail() -> None:
        with noting_failures(tmp_path, 5, 60) as pulse:
            pulse.at("stage 2, step 9")
            raise ValueError("a shape")

    with pytest.raises(ValueError, match="a shape"):
        fail()
    found = first_failure(tmp_path, 6)
    assert found is not None
    assert (found.rank, found.doing, found.why) == (5, "stage 2, step 9", "ValueError: a shape")
