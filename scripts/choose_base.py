"""Chooses the base of model families by real PyTorch runs on whole domains, and writes them for scripts/meta_train.py.

    python scripts/choose_base.py --search runs/meta/state --data DIR --models self_attention graph_convolution
    python scripts/meta_train.py --preset laptop --bases bases.json --data DIR --output runs/meta-again

The search of a meta-training run predicts, family by family, what configurations are worth. Candidates are what would
be best had other tasks been drawn (a bootstrap over the search's tasks), and those that a file lists, by `--also`. Each
is run as the untrained controller's base, decaying (a known horizon) and held (an unknown one), on every domain of role
"validation" in DIR, for a few seeds; the best by the mean over domains of log(NDCG@10 + 0.02) of validation users is
chosen. Of candidates that several families share, the best on average over all of them is chosen for "other" models.
What `--output` already holds of the same domains and seeds is not run again. With `--into`, a checkpoint that is at
rest for these families gets their bases. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm.auto import tqdm

from envs.benchmark.methods import Controllers
from envs.benchmark.store import Identity
from envs.benchmark.tasks import Domains, make_tasks
from envs.benchmark.trials import run_trial
from envs.public import load_folder
from envs.recommenders import RECOMMENDERS
from metalearn import load_controller
from metalearn.controller import CONTROLLED, ControllerConfig, load_checkpoint, save_checkpoint
from metalearn.controller.config import OTHER
from metalearn.controller.outcome import METRIC_OFFSET
from metalearn.errors import InvalidArgumentError, MetalearnError
from provenance import provenance
from workers import make_pool

HORIZONS = {"known": "base_decaying", "unknown": "base"}
"""What is chosen for, and the benchmark's method that runs it."""
CACHE = Path("runs/benchmark/domains")


def find_candidates(folder: Path, family: str, count: int, seed: int) -> list[dict[str, float]]:
    """Returns what the search of a meta-training run predicts to be best, for as many draws of its tasks.

    Args:
      folder: of the run's state, which holds search-0.npz and so on, and its config.

    Raises:
      InvalidArgumentError: the folder holds no search, or none of the family.
    """
    from metalearn.meta_training import warm_start

    described = folder / "config.json"
    if not described.exists():
        raise InvalidArgumentError(f"`--search` must be the state of a meta-training run, got {folder}")
    content = json.loads(described.read_text())["controller"]
    config = ControllerConfig(descriptors=tuple(content["descriptors"]), families=tuple(content["families"]))
    files = sorted(folder.glob("search-*.npz"), key=lambda path: int(path.stem.removeprefix("search-")))
    result = warm_start.join_searches([warm_start.SearchResult(**dict(np.load(file))) for file in files])
    chosen = warm_start.candidate_bases(result, config, family, count=count, seed=seed)
    return [
        {name: float(config.space[name].decode(unit)) for name, unit in zip(CONTROLLED, row, strict=True)}
        for row in chosen
    ]


def read_candidates(path: Path | None, family: str) -> list[dict[str, float]]:
    """Returns the configurations of a family that an output of this script has runs of, each once."""
    try:
        rows = json.loads(path.read_text())["runs"] if path else []
        return unique([row["configuration"] for row in rows if row["family"] == family])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"`--also` must be an output of this script, got {path} ({error!r})") from error


def unique(configurations: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Returns configurations in their order, each once."""
    return [one for index, one in enumerate(configurations) if one not in configurations[:index]]


def read_recorded(path: Path, domains: Sequence[str], seeds: int) -> list[dict]:
    """Returns the rows of an earlier run on the same domains and seeds; none if there is no such file.

    Raises:
      InvalidArgumentError: the file is of other domains or seeds, or none of this script.
    """
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text())
        told = record["provenance"]
        alike = sorted(told["domains"]) == sorted(domains) and told["seeds"] == list(range(seeds))
        rows: list[dict] = record["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"`--output` is there and no output of this script: {path} ({error!r})") from error
    if not alike:
        raise InvalidArgumentError(
            f"`--output` {path} is of the domains {told['domains']} and seeds {told['seeds']}; pass another path"
        )
    return rows


def measure(job: tuple[str, str, Path, str, int, Path]) -> tuple[float, float]:
    """Runs one base on one whole domain; returns NDCG@10 of all validation users, and the seconds that it took."""
    name, family, data, method, seed, checkpoint = job
    (task,) = make_tasks([name], [family])
    domain = Domains(load_folder(data), CACHE)[name]
    identity = Identity(task.name, method, 0, 0, seed)
    trial = run_trial(identity, {}, task, domain, Controllers(checkpoint))
    measured = {measurement.metric: measurement.value for measurement in trial.measurements}
    return measured[f"selection_ndcg@{task.settings.k}"], trial.cost


def save_base(configuration: dict[str, float], path: Path) -> Path:
    """Writes a checkpoint whose base is a configuration, for any model and horizon."""
    checkpoint = load_controller().checkpoint
    space = checkpoint.config.space
    encoded = np.array([space[name].encode(configuration[name]) for name in CONTROLLED], np.float32)
    return save_checkpoint(replace(checkpoint, base=np.broadcast_to(encoded, checkpoint.base.shape)), path)


def measure_all(
    family: str,
    cells: Sequence[tuple[str, dict[str, float]]],
    domains: Sequence[str],
    *,
    seeds: int,
    data: Path,
    workers: int,
) -> list[dict]:
    """Runs configurations of a family, each for a horizon, on every domain; returns a row for each."""
    with tempfile.TemporaryDirectory(prefix="choose-base-") as folder:
        paths = [save_base(one, Path(folder) / f"{index}.safetensors") for index, (_, one) in enumerate(cells)]
        jobs = [
            (name, family, data, HORIZONS[horizon], seed, path)
            for (horizon, _), path in zip(cells, paths, strict=True)
            for name in domains
            for seed in range(seeds)
        ]
        with make_pool(workers) as pool:
            runs = tqdm(pool.map(measure, jobs), total=len(jobs), desc=family, mininterval=5.0)
            measured = np.array(list(runs)).reshape(len(cells), len(domains), seeds, 2)
    rows = []
    for (horizon, configuration), values in zip(cells, measured, strict=True):
        by_domain = values[..., 0].mean(-1)
        rows.append(
            {
                "family": family,
                "horizon": horizon,
                "configuration": configuration,
                "score": float(np.log(by_domain + METRIC_OFFSET).mean()),
                "ndcg": dict(zip(domains, by_domain.tolist(), strict=True)),
                "seconds": float(values[..., 1].mean()),
            }
        )
    return rows


def choose(rows: Sequence[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the best configuration of each family and horizon, and of all families together."""
    scores: dict[str, dict[str, dict[tuple, float]]] = {}
    for row in rows:
        key = tuple(row["configuration"][name] for name in CONTROLLED)
        scores.setdefault(row["horizon"], {}).setdefault(row["family"], {})[key] = row["score"]
    bases: dict[str, dict[str, dict[str, float]]] = {}
    for horizon, families in scores.items():
        shared = set.intersection(*map(set, families.values()))
        together = {key: float(np.mean([one[key] for one in families.values()])) for key in shared}
        for family, found in {**families, **({OTHER: together} if together and len(families) > 1 else {})}.items():
            best = max(found, key=lambda key: found[key])
            bases.setdefault(family, {})[horizon] = dict(zip(CONTROLLED, best, strict=True))
    return bases


def save_into(path: Path, bases: Mapping[str, Mapping[str, dict[str, float]]]) -> None:
    """Writes bases, by family and horizon, into a checkpoint, and its card anew."""
    from metalearn.meta_training.model_card import write_model_card
    from metalearn.meta_training.release import rebased

    chosen = [
        (family, horizon == "known", tuple(values[name] for name in CONTROLLED))
        for family, horizons in bases.items()
        for horizon, values in horizons.items()
    ]
    checkpoint = rebased(load_checkpoint(path), chosen)
    save_checkpoint(checkpoint, path)
    write_model_card(checkpoint, path.with_name("README.md"))


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", type=Path, help="state folder of a meta-training run")
    parser.add_argument("--also", type=Path, help="an output of this script, whose configurations are candidates too")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of domains; those of role validation are taken"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these domains instead, by name, of whatever role")
    parser.add_argument("--models", nargs="+", choices=list(RECOMMENDERS), default=list(RECOMMENDERS))
    parser.add_argument("--horizons", nargs="+", choices=list(HORIZONS), default=list(HORIZONS))
    parser.add_argument("--candidates", type=int, default=6, help="of every family")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the candidates")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=Path("bases.json"))
    parser.add_argument("--into", type=Path, help="a checkpoint with these families at rest, to be given their bases")
    parser.add_argument("--quick", action="store_true", help="a smoke check: one domain, 2 candidates, 1 seed")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    domains = arguments.only or sorted(load_folder(arguments.data, role="validation"))
    seeds, count, models = arguments.seeds, arguments.candidates, arguments.models
    if arguments.quick:
        seeds, count, models, domains = 1, 2, models[:1], domains[:1]
    if arguments.search is None and arguments.also is None:
        raise InvalidArgumentError("there are no candidates; pass `--search`, `--also` or both")
    if arguments.into is not None:  # said before the runs, not after them
        from metalearn.meta_training.release import check_at_rest

        check_at_rest(load_checkpoint(arguments.into), models)
    rows = [] if arguments.quick else read_recorded(arguments.output, domains, seeds)
    for family in models:
        candidates = find_candidates(arguments.search, family, count, arguments.seed) if arguments.search else []
        candidates = unique([*candidates, *read_candidates(arguments.also, family)])
        if arguments.quick:
            candidates = candidates[:count]
        done = [(row["horizon"], row["configuration"]) for row in rows if row["family"] == family]
        cells = [(horizon, one) for horizon in arguments.horizons for one in candidates if (horizon, one) not in done]
        if cells:
            rows += measure_all(family, cells, domains, seeds=seeds, data=arguments.data, workers=arguments.workers)
        for row in sorted((row for row in rows if row["family"] == family), key=lambda r: (r["horizon"], -r["score"])):
            print(f"{family}, {row['horizon']}: {row['score']:.4f} {row['configuration']}", flush=True)
        bases = choose(rows)
        if not arguments.quick:
            record = {"bases": bases, "runs": rows, "provenance": provenance(domains=domains, seeds=list(range(seeds)))}
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.into is not None and not arguments.quick:
        save_into(arguments.into, {family: bases[family] for family in models})
    print(json.dumps({"bases": bases}))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
