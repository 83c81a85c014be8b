"""Trains RecBole's own models with RecBole's own Trainer on its own bundled ml-100k, without and with the controller.

    python scripts/recbole_example.py --models BPR LightGCN DeepFM           # three seeds, 50 epochs: an hour
    python scripts/recbole_example.py --models SASRec --epochs 6 --seeds 1   # on two cores an epoch takes minutes
    python scripts/recbole_example.py --quick                                # BPR, two epochs; writes nothing

Needs RecBole (docs/integrations.md says how to install it beside current libraries). Every arm goes through RecBole's
quick start and gets the same epochs, batches and evaluation; only what is named differs:

- `as shipped`: RecBole's defaults, Adam at 1e-3 without decay.
- `steered`: `learner: adamw`, and `steer(trainer, train_data)` before `fit`. AdamW alone changes nothing: without decay
  it is Adam, and an arm of its own gave what the first did, to the bit (in the record of three models).

All arms pick their best epoch on validation data and are tested once. Training runs all epochs in every arm
(`stopping_step` is `epochs`), so that all have the same budget.

The last line is JSON: the mean test metric by model and arm.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from integration_matrix import write_block

from metalearn.integrations.recbole import patch_recbole, steer
from provenance import provenance

MODELS: dict[str, dict[str, Any]] = {
    "BPR": {},
    "SASRec": {"train_neg_sample_args": None},
    "LightGCN": {},
    "DeepFM": {
        "threshold": {"rating": 4},
        "metrics": ["AUC", "LogLoss"],
        "valid_metric": "AUC",
        "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "RO", "group_by": "none", "mode": "labeled"},
    },
}
"""As in RecBole's own examples: a loss that needs no negatives for SASRec, labels from ratings for DeepFM."""
METRICS = {"BPR": "ndcg@10", "SASRec": "ndcg@10", "LightGCN": "ndcg@10", "DeepFM": "auc"}
ARMS = ("as shipped", "steered")
RECORD = Path(__file__).resolve().parent.parent / "docs" / "results" / "recbole.json"


def train(name: str, arm: str, *, epochs: int, seed: int, folder: Path) -> dict[str, float]:
    """Runs RecBole's quick start once; the lines that steer are marked."""
    patch_recbole()  # 1
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    settings = {
        "epochs": epochs,
        "stopping_step": epochs,
        "seed": seed,
        "use_gpu": False,
        "show_progress": False,
        "state": "ERROR",
        "checkpoint_dir": str(folder),
        **({} if arm == "as shipped" else {"learner": "adamw"}),  # 2
        **MODELS[name],
    }
    config = Config(model=name, dataset="ml-100k", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    train_data, valid_data, test_data = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train_data._dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    scheduler = steer(trainer, train_data) if arm == "steered" else None  # 3
    began = time.perf_counter()
    _, valid = trainer.fit(train_data, valid_data, verbose=False)
    seconds = time.perf_counter() - began
    test = trainer.evaluate(test_data)
    metric = METRICS[name]
    return {
        "seed": seed,
        "valid": float(valid[metric]),
        "test": float(test[metric]),
        "seconds": seconds,
        "decisions": 0 if scheduler is None else len(scheduler.decisions),
        "confidence": float("nan") if scheduler is None else scheduler.confidence,
    }


def table(models: dict[str, dict[str, Any]]) -> str:
    """Returns the table of means and ranges over seeds as Markdown."""
    lines = [f"| model, test metric | epochs | seeds | {' | '.join(ARMS)} |", "|---" * (len(ARMS) + 3) + "|"]
    for name, found in models.items():
        tests = [[run["test"] for run in found["arms"][arm]] for arm in ARMS]
        cells = [f"{np.mean(row):.4f} [{min(row):.4f}, {max(row):.4f}]" for row in tests]
        lines.append(f"| {name}, {METRICS[name]} | {found['epochs']} | {len(tests[0])} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Mean and range over seeds, of RecBole {version('recbole')}'s splits."])


def record(name: str, found: dict[str, Any]) -> None:
    """Writes the runs of a model beside those of others, and the table of all into the documentation."""
    seeds = [run["seed"] for run in found["arms"][ARMS[0]]]
    about = provenance(seeds=seeds, recbole=version("recbole"))
    models = json.loads(RECORD.read_text(encoding="utf8")) if RECORD.exists() else {}
    models[name] = {**found, "provenance": about}
    models = {key: models[key] for key in MODELS if key in models}
    RECORD.write_text(json.dumps(models, indent=1) + "\n", encoding="utf8")
    write_block("recbole", table(models))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="BPR, one seed, two epochs; write nothing")
    parser.add_argument("--epochs", type=int, default=50, help="of every arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments = parser.parse_args()

    names = ["BPR"] if arguments.quick else arguments.models
    epochs, seeds = (2, 1) if arguments.quick else (arguments.epochs, arguments.seeds)
    sys.argv = sys.argv[:1]  # RecBole's config reads the command line
    models: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="recbole-") as folder:
        os.chdir(folder)  # where RecBole writes its logs
        for name in names:
            found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
            for seed in range(2020, 2020 + seeds):
                for arm in ARMS:
                    run = train(name, arm, epochs=epochs, seed=seed, folder=Path(folder))
                    found[arm].append(run)
                    print(f"{name} {arm} {seed}: test {run['test']:.4f}, {run['seconds']:.0f} s", flush=True)
            models[name] = {"epochs": epochs, "arms": found}
            if not arguments.quick:  # after each model: a run that is ended early has recorded the ones before
                record(name, models[name])
    print(table(models))
    means = {
        f"{name}/{arm}": round(float(np.mean([run["test"] for run in runs])), 4)
        for name, found in models.items()
        for arm, runs in found["arms"].items()
    }
    print(json.dumps(means))


if __name__ == "__main__":
    main()
