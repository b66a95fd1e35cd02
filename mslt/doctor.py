"""Would a run succeed on these hosts? What a host finds on itself, what is compared between hosts, and the remedy for
each bad line. The hosts exchange it in mslt.rounds."""

import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import mslt
from mslt.config import load_recipe
from mslt.cost import operations, run_bytes, scaled, stage_cost, step_total
from mslt.data.manifest import (
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    check_size,
    check_tokenizer,
    parse_manifest,
)
from mslt.engine.ds_config import read_engine_config, reduced_bytes
from mslt.engine.gpus import check_gpus
from mslt.errors import MsltError
from mslt.files import sha256_file
from mslt.launcher import num_workers_here
from mslt.plan import Plan, autocast_dtype, micro_batch_size
from mslt.preflight import check_recipe, run_path
from mslt.provenance import provenance
from mslt.rundir import DOCTORS, KEPT, holds_run
from mslt.schedule import make_plan

MUST_BE_EQUAL = ("python", "torch", "deepspeed", "transformers", "mslt", "code")
CLOCK_WARN_S, CLOCK_FAIL_S = 10.0, 30.0  # hosts that are a minute apart take each other for dead (mslt.meeting)
SLOW_GBPS = 0.5
FAR_SLOWER = 3.0  # than the median of the others
SEEN_S = 10.0  # how long a file of another host may take to be seen; NFS asks the server for a name never looked up
DISK_SPARE = 1.2
BUSY_GPU = 0.5  # free memory, as a share of all

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """`fail` where a run would; `remedy` is empty where all is well."""

    host: str
    check: str
    status: Status
    said: str
    remedy: str = ""


@dataclass(frozen=True)
class Asked:
    """The run that is asked about. `workers` are those of a host, by default one a GPU, or one."""

    recipe: str | None = None
    run_dir: Path | None = None
    shards: Path | None = None
    num_hosts: int = 1
    workers: int | None = None
    expected_gpus: int | None = None
    min_gbps: float | None = None

    @property
    def run(self) -> Path:
        """The run directory, or without a recipe where those lie."""
        named = self.run_dir or Path("runs") if self.recipe is None else run_path(self.recipe, self.run_dir)
        return Path(os.path.abspath(named))


@dataclass(frozen=True)
class Facts:
    """What is compared between hosts. `plan` and `shards` are digests, None where there is none to be had;
    `operations_per_s` is what one worker's matrix products reach on a GPU, on CPUs those of all; None where a GPU does
    not work."""

    versions: dict[str, str | None]
    gpus: tuple[str, ...]
    run: str
    plan: str | None
    shards: str | None
    operations_per_s: float | None


def fails(findings: Iterable[Finding]) -> bool:
    return any(finding.status == "fail" for finding in findings)


def settled(findings: Iterable[Finding]) -> list[Finding]:
    """Without the ok of a host in what is found bad of it."""
    listed = list(findings)
    bad = {(finding.host, finding.check) for finding in listed if finding.status != "ok"}
    return [finding for finding in listed if finding.status != "ok" or (finding.host, finding.check) not in bad]


def of_mistake(host: str, check: str, error: MsltError | OSError) -> Finding:
    """A message of ours ends with its remedy, after the last semicolon; one of several lines holds several."""
    if isinstance(error, OSError):
        remedy = "see whether the disk or mount is well, and let the run's user read and write there"
        return Finding(host, check, "fail", f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), remedy)
    text = str(error)
    said, _, remedy = (text, "", "mend what it lists") if "\n" in text else text.rpartition("; ")
    return Finding(host, check, "fail", said or text, remedy if said else "")


# A host alone


def examine(host: str, asked: Asked, is_first: bool) -> tuple[Facts, list[Finding]]:
    """All that a host finds on itself, but for the shared folder."""
    gpus = visible_gpus()
    versions = versions_here()
    plan, found = read_plan_of(host, asked, len(gpus))
    autocast = None if plan is None else autocast_dtype(plan.engine)
    of_gpus = check_gpus_here(host, gpus, asked, autocast)
    folder = asked.shards or (None if plan is None else Path(plan.data.shards))
    manifest, of_shards = (None, []) if folder is None else check_shards(host, folder)
    if plan is not None and manifest is not None:
        plan = plan.model_copy(update={"shards_sha256": manifest.hash})
    if asked.recipe is not None and folder is not None and not fails([*found, *of_gpus, *of_shards]):
        try:
            check_recipe(asked.recipe, folder, num_workers_here(asked.workers) * asked.num_hosts)
            if is_first and plan is not None:
                holds_run(asked.run, plan)
        except (MsltError, OSError) as error:
            found.append(of_mistake(host, "recipe", error))
    of_disk = [] if plan is None else check_disk(host, asked.run, run_bytes(plan, KEPT))
    facts = Facts(
        versions,
        tuple(gpus),
        str(asked.run),
        None if plan is None else plan.model_copy(update={"shards_sha256": None}).digest(),
        None if manifest is None else manifest.hash,
        None if fails(of_gpus) else operations_per_s(autocast),
    )
    return facts, settled([*check_versions(host, versions), *found, *of_gpus, *of_shards, *of_disk])


def versions_here() -> dict[str, str | None]:
    """`code` is a digest of mslt's source: a commit does not say what was changed since."""
    about = provenance()
    digest = hashlib.sha256()
    package = Path(mslt.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    own = {"python": about["python"], "mslt": about["mslt"], "code": digest.hexdigest()[:12]}
    return {**own, "commit": about["commit"], **about["versions"], "torch": str(torch.__version__)}


def check_versions(host: str, versions: Mapping[str, str | None]) -> list[Finding]:
    missing = [name for name in MUST_BE_EQUAL if versions.get(name) is None]
    if missing:
        remedy = "install mslt with what it needs into this host's Python: pip install ."
        return [Finding(host, "versions", "fail", f"{', '.join(missing)}: not installed", remedy)]
    said = [f"{name} {versions[name]}" for name in MUST_BE_EQUAL if name != "code"]
    code = versions.get("commit") or f"code {versions['code']}"
    return [Finding(host, "versions", "ok", f"{', '.join(said)} ({code})")]


def read_plan_of(host: str, asked: Asked, num_gpus: int) -> tuple[Plan | None, list[Finding]]:
    """The plan without its shards, and whether it fits the number of workers."""
    if asked.recipe is None:
        return None, []
    try:
        recipe = load_recipe(asked.recipe)
        plan = make_plan(recipe, read_engine_config(recipe.engine), None)
    except MsltError as error:
        return None, [of_mistake(host, "recipe", error)]
    num_workers = (asked.workers or max(num_gpus, 1)) * asked.num_hosts
    try:
        for stage in plan.stages:
            micro_batch_size(stage, num_workers)
    except MsltError as error:
        return plan, [of_mistake(host, "recipe", error)]
    said = f"{asked.recipe}: {len(plan.stages)} stages, {plan.steps:,} steps on {_workers(num_workers)}"
    return plan, [Finding(host, "recipe", "ok", said)]


def _workers(number: int) -> str:
    return f"{number} worker{'s' * (number != 1)}"


def visible_gpus() -> list[str]:
    """Names of the GPUs that the workers of a run would use."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def check_gpus_here(
    host: str, gpus: list[str], asked: Asked, autocast: Literal["bfloat16", "float16"] | None
) -> list[Finding]:
    """As many GPUs as workers, each with kernels in this torch, and one that works; without any, that CPUs will."""
    expected = asked.expected_gpus or 0
    if not gpus and not expected:
        said = f"no GPU: {_workers(asked.workers or 1)} on {len(os.sched_getaffinity(0))} CPU cores"
        return [Finding(host, "gpus", "ok", said)]
    if len(gpus) < max(expected, asked.workers or 0):
        wanted = f"{expected} expected" if len(gpus) < expected else f"{asked.workers} workers need one each"
        return [Finding(host, "gpus", "fail", f"torch sees {len(gpus)} GPUs, {wanted}", _remedy_for_missing_gpus())]
    num_workers = asked.workers or len(gpus)
    try:
        check_gpus(autocast, num_workers)
    except MsltError as error:
        return [of_mistake(host, "gpus", error)]
    found = [finding for index in range(num_workers) for finding in _check_one_gpu(host, index, gpus[index])]
    counted = ", ".join(f"{number} × {name}" for name, number in Counter(gpus).items())
    return settled([Finding(host, "gpus", "ok", f"{counted}, all with kernels in torch {torch.__version__}"), *found])


def _remedy_for_missing_gpus() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: install a torch wheel that has it"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} is set: unset it, or name all GPUs"
    return "see whether `nvidia-smi` lists them: if not, the driver or the card; if so, its CUDA is too old for torch"


def _check_one_gpu(host: str, index: int, name: str) -> list[Finding]:
    gpu = f"GPU {index}, {name}"
    try:
        total = float((torch.ones(8, device=f"cuda:{index}") + 1).sum())
        free, all_of_it = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return [Finding(host, "gpus", "fail", f"{gpu}: {reason}", "see `nvidia-smi`; reset the GPU, or leave it out")]
    if total != 16:
        return [Finding(host, "gpus", "fail", f"{gpu}: 8 × (1 + 1) gives {total:g}", "replace the GPU")]
    if free < BUSY_GPU * all_of_it:
        said = f"{gpu}: {free / 1e9:.1f} GB of {all_of_it / 1e9:.1f} GB are free"
        return [Finding(host, "gpus", "warn", said, "`nvidia-smi` lists what else runs on it: end that")]
    return []


def check_shards(host: str, folder: Path) -> tuple[Manifest | None, list[Finding]]:
    """Every file against the manifest's sha256; None where there is no manifest to be read."""
    try:
        manifest = parse_manifest(folder)
    except (MsltError, OSError) as error:
        return None, [of_mistake(host, "shards", error)]
    entries = [shard for split in manifest.splits.values() for shard in split.shards]
    checks: list[Callable[[], None]] = [partial(check_tokenizer, folder, manifest.tokenizer)]
    for name, sha256 in manifest.tokenizer.others.items():
        checks.append(partial(_check_sha256, folder / TOKENIZER_FOLDER / name, sha256))
    checks += [partial(_check_shard, folder, entry) for entry in entries]

    def fault(check: Callable[[], None]) -> list[Finding]:
        try:
            check()
        except (MsltError, OSError) as error:
            return [of_mistake(host, "shards", error)]
        return []

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = [finding for each in pool.map(fault, checks) for finding in each]
    total = sum(entry.bytes for entry in entries)
    said = f"{folder}: {len(entries)} shards, {in_bytes(total)}, every checksum right"
    ok = Finding(host, "shards", "ok", f"{said} ({manifest.hash[:12]})")
    return manifest, found or [ok]


def _check_shard(folder: Path, entry: ShardEntry) -> None:
    check_size(folder / entry.file, entry)
    _check_sha256(folder / entry.file, entry.sha256)


def _check_sha256(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise MsltError(f"{path}: missing, though the manifest lists it; copy it from a host that has it")
    found = sha256_file(path)
    if found != sha256:
        raise MsltError(
            f"{path}: sha256 {found[:12]}, the manifest says {sha256[:12]}; copy it from a host where it is whole"
        )


def nearest_folder(path: Path) -> Path:
    """The path itself where it is a folder, else the lowest above it that is there."""
    return next(folder for folder in (path, *path.parents) if os.path.isdir(folder))  # which a stale mount is not


def check_disk(host: str, run: Path, needed_bytes: int) -> list[Finding]:
    """Room for all weights of the run, less what lies there already."""
    folder = nearest_folder(run)
    try:
        there = sum(path.stat().st_size for path in run.rglob("*.safetensors")) if folder == run else 0
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [of_mistake(host, "disk", error)]
    needed = max(needed_bytes - there, 0)
    said = f"{folder}: {in_bytes(free)} free, the run's checkpoints and models take {in_bytes(needed)}"
    if there:
        said += " more"
    remedy = f"make room for {in_bytes(needed - free)}" if free < needed else "make more room"
    remedy += ", or take another --run-dir"
    status: Status = "fail" if free < needed else "warn" if free < DISK_SPARE * needed else "ok"
    return [Finding(host, "disk", status, said, "" if status == "ok" else remedy)]


def operations_per_s(autocast: Literal["bfloat16", "float16"] | None) -> float | None:
    """What products of square matrices reach on this host; None where they do not go, for want of memory above all."""
    device, width = ("cuda", 4096) if visible_gpus() else ("cpu", 1024)
    dtype = getattr(torch, autocast) if autocast is not None and device == "cuda" else torch.float32
    taken_s = []
    try:
        one = torch.ones(width, width, device=device, dtype=dtype)
        for _ in range(4):
            started = time.perf_counter()
            float((one @ one)[0, 0])
            taken_s.append(time.perf_counter() - started)
    except RuntimeError:
        return None
    return 2 * width**3 / min(taken_s)


def in_bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"


# The folder that all hosts share


@dataclass(frozen=True)
class Token:
    """A file of the first host; `run` is the run directory there."""

    run: str
    path: str
    text: str


@contextmanager
def lay_token(host: str, run: Path) -> Iterator[tuple[Token | None, list[Finding]]]:
    """Write a file where the run directory is to be, for the other hosts to read; it goes at the end. None where it
    cannot be written."""
    folder, text = nearest_folder(run), secrets.token_hex(16)
    path = folder / f"{DOCTORS}{text[:8]}"
    try:
        try:
            with open(path, "x") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            yield None, [_not_written(host, folder, error)]
        else:
            yield Token(str(run), str(path), text), [Finding(host, "folder", "ok", f"{folder}: writable")]
    finally:
        with suppress(OSError):  # of a folder that cannot be written
            path.unlink()


def check_folder(host: str, run: Path, token: Token | None) -> list[Finding]:
    """Of a host that is not the first: whether it can write there, and whether it is the same folder."""
    folder = nearest_folder(run) if token is None else Path(token.path).parent
    remedy = "mount the first host's folder here under the same path, or give a --run-dir that all hosts share"
    if token is not None and str(run) != token.run:
        said = f"the run directory is {run} here, {token.run} on the first host"
        return [Finding(host, "folder", "fail", said, "give --run-dir as an absolute path on all hosts")]
    if not os.path.isdir(folder):
        return [Finding(host, "folder", "fail", f"{folder}: not there", remedy)]
    found = []
    if token is not None and not _is_seen(token):
        said = f"{folder}: not the first host's, a file that it wrote there is not seen here"
        found.append(Finding(host, "folder", "fail", said, remedy))
    try:
        with tempfile.NamedTemporaryFile(prefix=DOCTORS, dir=folder) as file:
            file.write(b"written")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        found.append(_not_written(host, folder, error))
    same = "writable" if token is None else "writable, and the first host's"
    return found or [Finding(host, "folder", "ok", f"{folder}: {same}")]


def _is_seen(token: Token) -> bool:
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            if Path(token.path).read_text() == token.text:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _not_written(host: str, folder: Path, error: OSError) -> Finding:
    said = f"{folder}: cannot be written ({error.strerror or error})"
    return Finding(host, "folder", "fail", said, "let the run's user write there, or take another --run-dir")


# Between hosts


def compare(facts: Mapping[str, Facts]) -> list[Finding]:
    """What differs from host to host. The first in `facts` decides where as many have the one as the other."""
    return [*_compare_versions(facts), *_compare_gpus(facts), *_compare_data(facts)]


def _most_common(values: Iterable[str | None]) -> str | None:
    return Counter(values).most_common(1)[0][0]  # of equals the first


def _compare_versions(facts: Mapping[str, Facts]) -> list[Finding]:
    found = []
    names = dict.fromkeys(name for each in facts.values() for name in each.versions if name != "commit")
    common = {name: _most_common(each.versions.get(name) for each in facts.values()) for name in names}
    for host, each in facts.items():
        other = {name: each.versions.get(name) for name in names if each.versions.get(name) != common[name]}
        grave = [name for name in other if name in MUST_BE_EQUAL]
        said = ", ".join(f"{name} {other[name]} ({common[name]} elsewhere)" for name in other)
        if grave:
            remedy = f"install the same {' and '.join(grave)} as on the other hosts"
            if grave == ["code"]:
                remedy = f"check out the same commit as on the other hosts (here {each.versions.get('commit')})"
            found.append(Finding(host, "versions", "fail", said, remedy))
        elif other:
            remedy = f"install the same {' and '.join(other)} as on the other hosts"
            found.append(Finding(host, "versions", "warn", said, remedy))
    return found


def _compare_gpus(facts: Mapping[str, Facts]) -> list[Finding]:
    found = []
    with_gpus = [each for each in facts.values() if each.gpus]
    common = _most_common(each.gpus[0] for each in with_gpus) if with_gpus else None
    for host, each in facts.items():
        if with_gpus and not each.gpus:
            said = f"torch sees no GPU, on {len(with_gpus)} of {len(facts)} hosts it does"
            remedy = "see whether `nvidia-smi` lists any here, and whether torch is built with CUDA"
            found.append(Finding(host, "gpus", "fail", said, remedy))
        elif each.gpus and set(each.gpus) != {common}:
            said = f"{', '.join(sorted(set(each.gpus)))}; elsewhere {common}"
            found.append(Finding(host, "gpus", "warn", said, "all wait for the slowest: take equal GPUs"))
    return found


def _compare_data(facts: Mapping[str, Facts]) -> list[Finding]:
    found = []
    for check, remedy in (
        ("shards", "copy the shard folder from a host that has the right one"),
        ("recipe", "give all hosts the same recipe file and engine configuration"),
    ):
        digests = {host: each.shards if check == "shards" else each.plan for host, each in facts.items()}
        known = {host: digest for host, digest in digests.items() if digest is not None}
        common = _most_common(known.values()) if known else None
        for host, digest in known.items():
            if digest != common:
                what = "the manifest's hash is" if check == "shards" else "gives a plan with the digest"
                said = f"other {check}: {what} {digest[:12]}, elsewhere {common[:12] if common else ''}"
                found.append(Finding(host, check, "fail", said, remedy))
    return found


def check_clock(host: str, ahead_s: float) -> Finding:
    """`ahead_s` of the first host's."""
    said = f"{abs(ahead_s):.2f} s {'ahead of' if ahead_s > 0 else 'behind'} the first host's"
    if abs(ahead_s) <= CLOCK_WARN_S:
        return Finding(host, "clock", "ok", f"within {max(abs(ahead_s), 0.1):.1f} s of the first host's")
    status: Status = "fail" if abs(ahead_s) > CLOCK_FAIL_S else "warn"
    return Finding(host, "clock", status, said, "let chrony or systemd-timesyncd set the clocks of all hosts")


def check_links(gbps: Mapping[str, float], min_gbps: float | None) -> list[Finding]:
    """Of each host's link to the first, as measured. A slow one fails no run, unless `min_gbps` are asked for."""
    found = []
    for host, rate in gbps.items():
        others = sorted(other for name, other in gbps.items() if name != host)
        median = others[len(others) // 2] if others else None
        said = f"{rate:.2g} Gbit/s to the first host" if rate < 10 else f"{rate:.0f} Gbit/s to the first host"
        remedy = (
            "see at which speed cable and switch port run (`ethtool`), and which network carries it: "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface"
        )
        if min_gbps is not None and rate < min_gbps:
            found.append(Finding(host, "link", "fail", f"{said}, under the {min_gbps:g} asked for", remedy))
        elif median is not None and rate * FAR_SLOWER < median:
            found.append(Finding(host, "link", "warn", f"{said}, the others have {median:.2g}", remedy))
        elif rate < SLOW_GBPS:
            found.append(Finding(host, "link", "warn", f"{said}, under {SLOW_GBPS:g}", remedy))
        else:
            found.append(Finding(host, "link", "ok", said))
    return found


def largest_payload(plan: Plan) -> int:
    """Bytes of gradients that the stage with most of them all-reduces in a step."""
    return max(_gradient_bytes(plan))


def _gradient_bytes(plan: Plan) -> list[int]:
    return [stage_cost(plan.model, stage).trainable_parameters * reduced_bytes(plan.engine) for stage in plan.stages]


def check_gradients(plan: Plan, seconds_per_byte: float, operations_per_s: float, num_computing: int) -> Finding:
    """What all-reducing the gradients takes in a step of each stage, and how much of the step that is at most:
    `num_computing` share its samples, each as fast as products of matrices go, which a whole step does not reach.
    `operations_per_s` is 0 where that is not known."""
    stages_with: dict[str, list[int]] = {}
    total_s = 0.0
    for index, (stage, payload) in enumerate(zip(plan.stages, _gradient_bytes(plan), strict=True)):
        reducing_s = payload * seconds_per_byte
        said = f"{in_bytes(payload)} in {reducing_s:.2g} s"
        if operations_per_s:
            of_sample = operations(plan.model, stage.sequence_length, plan.data.max_predictions)
            of_step = step_total(scaled(of_sample, stage.batch_size / num_computing), plan.model, stage)
            said += f", up to {reducing_s / (reducing_s + of_step / operations_per_s):.0%} of a step"
        stages_with.setdefault(said, []).append(index + 1)
        total_s += stage.steps * reducing_s
    parts = [
        f"stage{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}: {said}"
        for said, numbers in stages_with.items()
    ]
    hours = f"{total_s / 3600:,.1f} h" if total_s >= 3600 else f"{total_s / 60:,.1f} min"
    return Finding("all", "gradients", "ok", f"{'; '.join(parts)}; {hours} in the whole run")
