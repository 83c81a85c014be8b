"""Puts other bases under a trained policy, for more model families than it was trained on.

    cd checkpoints
    python ../scripts/rebase_checkpoint.py golden/format-1/controller.safetensors default/bases.json \
        --output default/controller.safetensors

The bases are those of scripts/choose_base.py: configurations that did best on whole validation domains. The policy's
in-run part is kept to the bit. Its start part shifts a domain's start from the base that it was trained on, which is no
longer there: it is put to rest, and every run starts at its family's base. Families that the policy does not know get
an embedding of zero, which is how it reads a family that it was not told; those that it does no good keep to the base.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from metalearn.controller import CONTROLLED, Checkpoint, load_checkpoint, save_checkpoint
from metalearn.errors import InvalidArgumentError, MetalearnError

_CARD = """# Model card: metalearn controller

Maps how training is going to changes of learning rate, weight decay, beta1 (per parameter group) and dropout, around a
base for each model family. Made by `scripts/rebase_checkpoint.py` from an earlier checkpoint, whose
[card](../golden/format-1/README.md) says how its policy was meta-trained; `bases.json` holds what follows in numbers.

## Policy
- Trained on {num_tasks} tasks of matrix factorisation: slices of {num_domains} real domains, and simulated ones.
  {episodes} episodes of {num_decisions} decisions.
- In a run it acts as it was trained, on whatever base it is given. It knows no family by name.
- It is at rest for {at_rest}: there it did worse than the base alone on validation domains.
- Its start is at rest: runs begin at the base of their family. What it had learnt of starts was about another base.
- It has no outcome model: `decision.improvement` is None.

## Base
With cosine decay (known horizon), or held with averaged iterates (unknown horizon). `other` is for models of any other
family, or of none named.

| family | horizon | {names} |
|---|---|{rules}|
{base}

## How the bases were chosen
NDCG@10 of all validation users of whole validation domains, at the weights that validated best, mean over seeds; chosen
by the mean of log(NDCG@10 + 0.02) over domains, where there is a choice. Domains that choose a base flatter it.

| family | horizon | {names} | seeds | {domains} |
|---|---|{rules}|---|{domain_rules}|
{runs}

{note}

## Limits
- In-run actions were learnt on matrix factorisation only; docs/evidence.md says what they do to other families.
- Where a domain's descriptors leave the training range, actions shrink; far outside, the base schedule runs as it is.
- Trained for horizons of {horizons} optimizer steps and 20 decisions.
"""
OTHER = "other"
"""Key of the base for models of no family named."""
HORIZONS = ("unknown", "known")


def rebase(checkpoint: Checkpoint, bases: dict, at_rest: Sequence[str]) -> Checkpoint:
    """Returns the checkpoint with a base for each family, and a start at rest.

    Args:
      checkpoint: a trained one.
      bases: family, and "other", to "known" and "unknown" to values by hyperparameter.
      at_rest: families that the policy does no good, of which only the base is used.

    Raises:
      InvalidArgumentError: there is no base for other models, or the checkpoint has families of its own.
    """
    if OTHER not in bases:
        raise InvalidArgumentError(f"`bases` must have one for {OTHER!r} models, got {sorted(bases)}")
    if checkpoint.config.families:
        raise InvalidArgumentError(
            f"the checkpoint has bases of {list(checkpoint.config.families)}; meta-train with --bases instead"
        )
    space = checkpoint.config.space
    families = tuple(sorted(set(bases) - {OTHER}))
    rows = [
        [[space[name].encode(bases[family][horizon][name]) for name in CONTROLLED] for horizon in HORIZONS]
        for family in (OTHER, *families)
    ]
    network = {
        name: np.zeros_like(tensor) if name.startswith("modifier/") else tensor
        for name, tensor in checkpoint.network.items()
    }
    kept = {name: value for name, value in checkpoint.provenance.items() if name != "release_base"}
    network["family"] = np.pad(network["family"], ((0, len(families)), (0, 0)))
    return replace(
        checkpoint,
        config=replace(checkpoint.config, families=families, at_rest=tuple(at_rest)),
        network=network,
        base=np.array(rows, np.float32),
        outcome={},
        provenance={**kept, "rebased": {"bases": bases, "start": "at rest"}},
    )


def write_card(checkpoint: Checkpoint, content: dict, path: Path) -> None:
    """Writes the model card.

    Args:
      checkpoint: a rebased one.
      content: of the file of bases, with `runs` and `note`.
    """
    provenance = checkpoint.provenance
    steps = [bound for bounds in provenance["meta_training"]["steps_range"] for bound in bounds]
    decisions = checkpoint.config.num_decisions
    domains = list(content["runs"][0]["ndcg"])

    def row(*cells: object) -> str:
        return "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"

    def values(configuration: dict) -> list[float]:
        return [float(configuration[name]) for name in CONTROLLED]

    path.write_text(
        _CARD.format(
            num_tasks=sum(provenance["tasks"]),
            num_domains=len(provenance["domains"]),
            episodes=provenance["episodes"],
            num_decisions=decisions,
            at_rest=", ".join(checkpoint.config.at_rest) or "no family",
            names=" | ".join(CONTROLLED),
            rules="---|" * (len(CONTROLLED) - 1) + "---",
            base="\n".join(
                row(family, horizon, *values(content["bases"][family][horizon]))
                for family in (OTHER, *checkpoint.config.families)
                for horizon in ("known", "unknown")
            ),
            domains=" | ".join(domains),
            domain_rules="---|" * (len(domains) - 1) + "---",
            runs="\n".join(
                row(
                    run["family"],
                    run["horizon"],
                    *values(run["configuration"]),
                    run["seeds"],
                    *(float(run["ndcg"][domain]) for domain in domains),
                )
                for run in content["runs"]
            ),
            note=content["note"],
            horizons=f"{min(steps) * decisions} to {max(steps) * decisions}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bases", type=Path, help="JSON with `bases`, as scripts/choose_base.py writes it")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint; its card is written beside it")
    arguments = parser.parse_args()
    content = json.loads(arguments.bases.read_text())
    rebased = rebase(load_checkpoint(arguments.checkpoint), content["bases"], content["at_rest"])
    path = save_checkpoint(rebased, arguments.output)
    write_card(rebased, content, path.with_name("README.md"))
    print(path)


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
