"""Fuzzes every parser of outside input with atheris, which is guided by the code that an input reaches.

    python scripts/fuzz.py --seconds 30             # each parser for so long
    python scripts/fuzz.py --only space --seconds 600
    python scripts/fuzz.py --quick                  # two seconds each
    python scripts/fuzz.py --list                   # without atheris

Needs `pip install atheris`. Each parser gets a mutated valid input and is to return something, or to raise a
MetalearnError; anything else is a finding: its input is left under `--output`, and the script ends with status 1. Code
that an input had executed would show as a changed file or variable: parsers only read data, and one target says so of
pickles. A target is a process of its own, since atheris cannot be stopped otherwise.

The last line is JSON: `inputs` and `findings`, of all and by target, and the seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MAX_BYTES = 4096
"""Longest input; the checkpoint's target takes only the header from it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Holds what is fuzzed.

    Args:
      parse: takes bytes; raises MetalearnError, or returns.
      seeds: returns valid inputs to begin from.
    """

    parse: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]


def text_of(content: bytes) -> str:
    """Returns bytes as text, whatever they are."""
    return content.decode("utf-8", "surrogateescape")


def in_file(parse: Callable[[Path], object], suffix: str) -> Callable[[bytes], object]:
    """Returns a parser of bytes that writes them to a file for one of files."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def parse_bytes(content: bytes) -> object:
        path = folder / f"input{suffix}"
        path.write_bytes(content)
        return parse(path)

    return parse_bytes


def space() -> Target:
    from metalearn.spaces import CANONICAL_SPACE, HyperparameterSpace

    return Target(
        parse=lambda content: HyperparameterSpace.from_json(text_of(content)),
        seeds=lambda: [CANONICAL_SPACE.to_json().encode()],
    )


def config() -> Target:
    import metalearn
    from metalearn.controller.config import ControllerConfig

    return Target(
        parse=lambda content: ControllerConfig.from_json(text_of(content)),
        seeds=lambda: [metalearn.load_controller().config.to_json().encode()],
    )


def profile() -> Target:
    import metalearn

    rows = metalearn.Interactions.from_arrays([1, 1, 2, 2, 3], [5, 6, 6, 7, 6])
    return Target(
        parse=lambda content: metalearn.DomainProfile.from_json(text_of(content)),
        seeds=lambda: [metalearn.profile_domain(rows).to_json().encode()],
    )


def checkpoint() -> Target:
    """The bytes of a file as they are: a digest guards what is behind them."""
    from metalearn.controller.checkpoint import load_checkpoint

    return Target(parse=in_file(load_checkpoint, ".safetensors"), seeds=lambda: [_small_checkpoint()])


def sealed_checkpoint() -> Target:
    """The header of a checkpoint whose digest is right: what somebody may send who knows the format."""
    from safetensors.numpy import load, save

    from metalearn.controller import checkpoint as module

    whole = _small_checkpoint()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])["__metadata__"]
    tensors = load(whole)
    fields = ("format_version", "feature_schema", "space", "config", "package_version", "provenance")
    load_checkpoint = in_file(module.load_checkpoint, ".safetensors")

    def parse(content: bytes) -> object:
        if not content:
            return None
        field = fields[content[0] % len(fields)]
        changed = {**header, field: content[1:].decode("utf-8", "replace")}
        changed["sha256"] = module._digest(tensors, changed)
        return load_checkpoint(save(tensors, metadata=changed))

    return Target(parse=parse, seeds=lambda: [bytes([i]) + header[f].encode() for i, f in enumerate(fields)])


def _small_checkpoint() -> bytes:
    import metalearn
    from metalearn.controller.checkpoint import save_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        shipped = metalearn.load_controller().checkpoint
        return save_checkpoint(shipped, Path(folder) / "controller.safetensors").read_bytes()


def audit() -> Target:
    from metalearn.audit import AuditLog, read_records, verify

    def seed() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            log = AuditLog(path, name="run", tenant="t")
            for index in range(3):
                log.append("note", {"index": index})
            return path.read_bytes()

    def parse(path: Path) -> None:
        head = path.with_name(path.name + ".head")
        head.write_bytes(_head(path.read_bytes()))
        for read in (lambda: list(read_records(path)), lambda: verify(path)):
            _refusing(read)

    return Target(parse=in_file(parse, ".log"), seeds=lambda: [seed()])


def anchor() -> Target:
    from metalearn.audit.record import START, format_anchor, parse_anchor

    return Target(parse=lambda content: parse_anchor(content, "anchor"), seeds=lambda: [2 * format_anchor(START)])


def report() -> Target:
    """A properly sealed log with a record of any content after a sound one: a page, or an error that says why not."""
    import metalearn
    from metalearn.audit import AuditLog, RecordKind, write_report

    rows = metalearn.Interactions.from_arrays([1, 1, 2, 2, 3], [5, 6, 6, 7, 6])
    start = metalearn.load_controller().start(metalearn.profile_domain(rows), horizon=100).ask()
    folder, kinds = Path(tempfile.mkdtemp(prefix="fuzz-")), [kind for kind in RecordKind if kind != "genesis"]

    def parse(content: bytes) -> None:
        try:
            told = json.loads(content[1:])
        except (ValueError, RecursionError):
            return
        if not isinstance(told, dict):
            return
        for name in ("log", "log.head"):
            (folder / name).unlink(missing_ok=True)
        log = AuditLog(folder / "log", name="run")
        log.record_decision(start)
        log.append(kinds[content[0] % len(kinds)], told)
        write_report(folder / "log", folder / "run.html")

    told = json.dumps(start.as_dict()).encode()
    return Target(parse=parse, seeds=lambda: [bytes([kind]) + told for kind in range(len(kinds))])


def interactions_csv() -> Target:
    from metalearn import Interactions

    rows = b"user_id,item_id,timestamp,rating\n1,a,1.5,5\n1,b,2,4\n2,a,2020-01-01,\n"
    plain = b"user_id,item_id,timestamp,rating\n1,5,15,5\n1,6,20,4\n2,5,30,1\n"
    return Target(parse=in_file(Interactions.read, ".csv"), seeds=lambda: [rows, plain])


def interactions_parquet() -> Target:
    from metalearn import Interactions

    def seed() -> bytes:
        import polars

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.parquet"
            frame = polars.DataFrame({"user_id": [1, 1, 2], "item_id": [5, 6, 5], "timestamp": [1, 2, 3]})
            frame.write_parquet(path)
            return path.read_bytes()

    return Target(parse=in_file(Interactions.read, ".parquet"), seeds=lambda: [seed()])


def bases() -> Target:
    from meta_train import read_bases

    shipped = Path(__file__).parent.parent / "checkpoints" / "default" / "bases.json"
    return Target(parse=in_file(lambda path: read_bases(path), ".json"), seeds=lambda: [shipped.read_bytes()])


def incidents() -> Target:
    from envs.sandbox import read_mix

    mix = {"incidents": {"drift": {"episodes": 3, "variants": ["abrupt"], "recurs": True}}, "compound": 0.5, "seed": 0}
    return Target(parse=in_file(read_mix, ".json"), seeds=lambda: [json.dumps(mix).encode()])


def ledger() -> Target:
    from metalearn.privacy import PrivacyLedger

    def seed() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            kept = PrivacyLedger(Path(folder) / "ledger", epsilon=2.0, delta=0.0)
            kept.charge("t", 0.5, release="00")
            return kept.path.read_bytes()

    def parse(path: Path) -> object:
        return PrivacyLedger(path, epsilon=2.0, delta=0.0).spent("t")

    return Target(parse=in_file(parse, ".jsonl"), seeds=lambda: [seed()])


def snapshot() -> Target:
    import torch

    from metalearn.torch import Snapshots

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def snapshots() -> Snapshots:
        layer = torch.nn.Linear(2, 1)
        return Snapshots(modules=[layer], optimizers=[torch.optim.SGD(layer.parameters())], place="disk", folder=folder)

    def seed() -> bytes:
        snapshots().save(1, {"step": 1})
        return (folder / "snapshot.pt").read_bytes()

    def parse(content: bytes) -> None:
        (folder / "snapshot.pt").write_bytes(content)
        snapshots().extra()

    return Target(parse=parse, seeds=lambda: [seed()])


TARGETS: dict[str, Callable[[], Target]] = {
    make.__name__: make
    for make in (
        *(space, config, profile, checkpoint, sealed_checkpoint, audit, anchor, report),
        *(interactions_csv, interactions_parquet, bases, incidents, ledger, snapshot),
    )
}


def _head(log: bytes) -> bytes:
    """Returns an anchor that names the last whole line, so that a log of right form gets past it."""
    from metalearn.audit.record import START, Head, format_anchor

    lines = log.split(b"\n")[:-1]
    found = re.search(rb'"hash":"([0-9a-f]{64})"', lines[-1]) if lines else None
    return 2 * format_anchor(START if found is None else Head(len(lines) - 1, found[1].decode()))


def _refusing(read: Callable[[], object]) -> None:
    from metalearn.errors import MetalearnError

    try:
        read()
    except MetalearnError as error:
        if not str(error):
            raise AssertionError("the error says nothing") from error


def run_one(target: Target, content: bytes) -> None:
    """Parses one input.

    Raises:
      Exception: any that is no way to refuse an input.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _refusing(lambda: target.parse(content))


def fuzz(name: str, seconds: int, output: Path) -> None:
    """Fuzzes one target in this process, which atheris ends."""
    import atheris

    with atheris.instrument_imports(include=["metalearn", "envs.sandbox.incidents", "meta_train"]):
        target = TARGETS[name]()
    corpus = output / name
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = target.seeds()
    for index, seed in enumerate(seeds):
        (corpus / f"seed-{index}").write_bytes(seed)
    longest = max(MAX_BYTES, *(len(seed) + 64 for seed in seeds))
    options = [f"-max_total_time={seconds}", f"-max_len={longest}", f"-artifact_prefix={output / name}-", "-timeout=20"]
    atheris.Setup(
        [sys.argv[0], *options, "-rss_limit_mb=4096", "-print_final_stats=1", str(corpus)],
        lambda content: run_one(target, content),
    )
    atheris.Fuzz()


def run_all(names: list[str], seconds: int, output: Path) -> dict[str, Any]:
    """Fuzzes each target in a process of its own; returns what was tried and found."""
    figures: dict[str, Any] = {}
    for name in names:
        command = [sys.executable, __file__, "--child", name, "--seconds", str(seconds), "--output", str(output)]
        began = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10 * seconds + 300)
        count = re.search(r"stat::number_of_executed_units:\s+(\d+)", ended.stderr)
        findings = [str(path) for path in sorted(output.glob(f"{name}-*")) if path.is_file()]
        failed = ended.returncode != 0
        figures[f"inputs_{name}"] = int(count[1]) if count else 0
        figures[f"findings_{name}"] = max(len(findings), int(failed))
        print(f"{name:22s} {figures[f'inputs_{name}']:>9} inputs, {time.perf_counter() - began:.0f} s", flush=True)
        if failed:
            print("\n".join([*findings, *ended.stderr.splitlines()[-40:]]), flush=True)
    total = {key: sum(v for n, v in figures.items() if n.startswith(f"{key}_")) for key in ("inputs", "findings")}
    return total | figures | {"seconds": seconds * len(names)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30, help="for each target")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), help="these targets")
    parser.add_argument("--quick", action="store_true", help="two seconds each")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--output", type=Path, help="a folder for corpora and findings; default: a temporary one")
    parser.add_argument("--child", choices=list(TARGETS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(TARGETS))
        return 0
    output = arguments.output or Path(tempfile.mkdtemp(prefix="fuzz-findings-"))
    if arguments.child is not None:
        fuzz(arguments.child, arguments.seconds, output)
        return 0
    try:
        import atheris  # noqa: F401
    except ImportError:
        raise SystemExit("error: atheris is not installed; pip install atheris") from None
    figures = run_all(arguments.only or list(TARGETS), 2 if arguments.quick else arguments.seconds, output)
    print(json.dumps(figures))
    return 1 if figures["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
