"""The model card: what a controller was trained on, what it did on validation domains, where not to trust it."""

from __future__ import annotations

from pathlib import Path

from metalearn.controller.checkpoint import Checkpoint
from metalearn.controller.config import CONTROLLED

_TEMPLATE = """# Model card: metalearn controller

Maps what a recommendation domain looks like, and how training is going, to learning rate, weight decay, beta1 (per
parameter group) and dropout. Written by `scripts/meta_train.py`; everything below is in the checkpoint's header.

## Trained on
- Learner: matrix factorisation with the BPR loss and AdamW; sizes (users x items): {sizes}.
- {num_tasks} tasks: slices of {num_domains} real domains, and simulated domains beside them.
- Real domains: {domains}.
- {episodes} episodes of {num_decisions} decisions; preset `{preset}`, seed {seed}, commit {commit}.

## Base
With cosine decay (known horizon), or held with averaged iterates (unknown horizon). An untrained or out-of-range
controller is exactly this. The search's trials gave one for the policy to learn on. With the trained policy, that one
and its neighbours in rate and decay were then run to the full length on the largest tasks of the validation domains,
and another was taken only if its controlled runs were better beyond noise.

| horizon | {names} |
|---|{rules}|
{base}

Mean log((NDCG@10 + 0.02) / (popularity + 0.02)) on those tasks, before and after that choice, and of the candidate that
is best without a controller, which is what a controller is to be compared with ({best_fixed}, horizon known):

| horizon | base before | base | controlled before | controlled | best fixed |
|---|---|---|---|---|---|
{choice}

## Validation
Mean gain in log((NDCG@10 + 0.02) / (popularity + 0.02)) of one controlled run over the base schedule, on slices of
domains that were never trained on ({validation_domains}), on the base it learnt on. These chose the released
iteration, so they flatter it; test figures are in the README.

| figure | value |
|---|---|
{figures}

## Limits
- Meta-trained on one model family. On others it has not been measured.
- Where a domain's descriptors leave the training range, actions shrink; far outside, the base schedule runs as it is.
- Trained for horizons of {horizons} optimizer steps and 20 decisions.
"""


def write_model_card(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the card beside a checkpoint, from its provenance alone."""
    provenance, config = checkpoint.provenance, checkpoint.config
    training = provenance["meta_training"]
    steps = [bound for bounds in training["steps_range"] for bound in bounds]
    rows = []
    for told, label in ((1, "known"), (0, "unknown")):
        cells = (
            config.space[name].decode(float(value))
            for name, value in zip(CONTROLLED, checkpoint.base[told], strict=True)
        )
        rows.append(f"| {label} | " + " | ".join(f"{cell:.4g}" for cell in cells) + " |")
    choice = [
        f"| {label} | "
        + " | ".join(
            f"{provenance['release_base'][f'{label}/{name}']:.3f}"
            for name in ("fixed_before", "fixed", "controlled_before", "controlled", "fixed_best")
        )
        + " |"
        for label in ("known", "unknown")
    ]
    path.write_text(
        _TEMPLATE.format(
            sizes=", ".join(
                f"{b['users']} x {b['items']} (d {b['dim']}, batch {b['batch']})" for b in provenance["buckets"]
            ),
            num_tasks=sum(provenance["tasks"]),
            num_domains=len(provenance["domains"]),
            domains=", ".join(provenance["domains"]) or "none",
            episodes=provenance["episodes"],
            num_decisions=config.num_decisions,
            preset=provenance["preset"],
            seed=training["seed"],
            commit=provenance["commit"],
            names=" | ".join(CONTROLLED),
            rules="---|" * (len(CONTROLLED) - 1) + "---",
            base="\n".join(rows),
            choice="\n".join(choice),
            best_fixed=", ".join(
                f"{name} {provenance['release_base'][f'known/best_fixed/{name}']:.3g}" for name in CONTROLLED
            ),
            validation_domains=", ".join(provenance["validation_domains"]) or "simulated ones",
            figures="\n".join(f"| {name} | {value:+.4f} |" for name, value in provenance["validation"].items()),
            horizons=f"{min(steps) * config.num_decisions} to {max(steps) * config.num_decisions}",
        )
    )
