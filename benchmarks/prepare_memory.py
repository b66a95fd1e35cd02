"""Does preparation's memory stay where it is when the text grows tenfold?

    python -m benchmarks.prepare_memory DATA OUT [--record FILE]

DATA holds wikipedia/extracted and books; OUT gets 120 MB and 1.2 GB of text made of copies of them, which a word of
their own after every fourth makes distinct, and the shards. The peak of every process is its unique set size, looked at
ten times a second. Exit status 1 when one holds 1.5 GB, the index of near duplicates apart, or grows by 10 %.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import yaml

from benchmarks.record import hardware, heading, table, write_record
from data_prep.duplicates import NEAR_INDEX_BYTES
from mslt.data.manifest import read_manifest
from mslt.provenance import provenance

SIZES_BYTES = (120_000_000, 1_200_000_000)
MAX_BYTES = 1_500_000_000
MAX_GROWTH = 1.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", type=Path, help="Markdown file to write, beside printing it")
    options = parser.parse_args()
    rows, held = [], []
    for size_bytes in SIZES_BYTES:
        text = options.out / f"text-{size_bytes}"
        if not text.exists():
            write_copies(options.data, text, size_bytes)
        shards = options.out / f"shards-{size_bytes}"
        shutil.rmtree(shards, ignore_errors=True)
        began = time.perf_counter()
        parent_bytes, worker_bytes = peaks(text, shards)
        seconds = time.perf_counter() - began
        documents = sum(source.read.documents for source in read_manifest(shards).sources)
        index_bytes = documents * NEAR_INDEX_BYTES
        held.append(max(parent_bytes - index_bytes, worker_bytes))
        counts = [f"{size_bytes / 1e6:,.0f}", f"{documents:,}", f"{seconds:,.0f}"]
        rows.append([*counts, *(f"{peak / 1e6:,.0f}" for peak in (parent_bytes, index_bytes, worker_bytes, held[-1]))])
    growth = held[-1] / held[0]
    good = max(held) < MAX_BYTES and growth < MAX_GROWTH
    command = "python -m benchmarks.prepare_memory DATA OUT"
    lines = heading("Memory of preparation", command, provenance(), hardware())
    columns = [
        "MB of text",
        "documents",
        "s",
        "parent MB",
        "index in it MB",
        "largest worker MB",
        "peak without index MB",
    ]
    lines += [
        "Two workers, a vocabulary of 30,522. Peaks are unique set sizes. Seconds are not a claim.",
        "",
        *table(columns, rows),
        "",
        f"Near duplicates take {NEAR_INDEX_BYTES} bytes a document, capped by `duplicates.max_index_gb`. Without that, "
        f"the peak grows by {growth - 1:+.1%} with ten times the text: the aims (1.5 GB, growth under 10 %) are "
        f"{'held' if good else 'MISSED'}.",
    ]
    write_record(options.record, lines)
    sys.exit(0 if good else 1)


def write_copies(data: Path, out: Path, size_bytes: int) -> None:
    """Files of the sources again and again, until they hold `size_bytes`, every copy unlike all others."""
    files = {
        kind: sorted(p for p in (data / kind).rglob("*") if p.is_file()) for kind in ("wikipedia/extracted", "books")
    }
    written = copy = 0
    while written < size_bytes:
        for kind, paths in files.items():
            for path in paths:
                if written >= size_bytes:
                    return
                target = out / kind / f"copy-{copy}" / path.relative_to(data / kind)
                target.parent.mkdir(parents=True, exist_ok=True)
                text = path.read_text(encoding="utf-8", errors="replace")
                target.write_text("\n".join(distinct(line, copy) for line in text.split("\n")))
                written += target.stat().st_size
        copy += 1


def distinct(line: str, copy: int) -> str:
    """The line with a word of this copy's own after every fourth; marks of the format stay as they are."""
    if not copy or line.startswith(("<", "***")):
        return line
    words = line.split(" ")
    for place in range(4, len(words), 5):
        words.insert(place, f"copy{copy}")
    return " ".join(words)


def peaks(text: Path, shards: Path) -> tuple[int, int]:
    """Peak unique set sizes of the preparing process and of the largest of its workers."""
    sources = [{"kind": "wikipedia", "path": "wikipedia/extracted"}, {"kind": "books", "path": "books"}]
    recipe = text / "data.yaml"
    recipe.write_text(yaml.safe_dump({"sources": sources, "vocabulary": {"size": 30522}}))
    command = [sys.executable, "-m", "mslt.cli.main", "data", "prepare", str(recipe), str(shards.resolve())]
    parent = psutil.Popen([*command, "--workers", "2"], cwd=text)
    peak_bytes: dict[int, int] = defaultdict(int)
    while parent.poll() is None:
        for process in [parent, *children(parent)]:
            try:
                peak_bytes[process.pid] = max(peak_bytes[process.pid], process.memory_full_info().uss)
            except psutil.Error:
                continue
        time.sleep(0.1)
    if parent.returncode:
        raise subprocess.CalledProcessError(parent.returncode, command)
    return peak_bytes.pop(parent.pid), max(peak_bytes.values())


def children(parent: psutil.Process) -> list[psutil.Process]:
    try:
        return parent.children(recursive=True)
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
