"""The model card: what a controller was trained on, what it did on validation domains, where not to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metalearn.controller.checkpoint import Checkpoint
from metalearn.controller.config import CONTROLLED

_TEMPLATE = """# Model card: metalearn controller

Maps what a recommendation domain looks like, and how training is going, to learning rate, weight decay, beta1 (per
parameter group) and dropout. Written by `scripts/meta_train.py`; everything below is in the checkpoint's header.

## Trained on
- Families, each with AdamW and at these sizes (users x items): {sizes}.
- {num_tasks} tasks: slices of {num_domains} real domains, and simulated domains beside them.
- Real domains: {domains}.
- {episodes} episodes of {num_decisions} decisions; preset `{preset}`, seed {seed}, commit {commit}.

## Base
Where a loop evaluates averaged weights, the rate is held; where it evaluates the weights as they are, the rate decays
over the horizon, by a cosine to {decayed:.0%}. An untrained or out-of-range controller is exactly this: the
configuration that did best, without a controller, on the largest meta-training tasks of the family; `other` is for
models of any other family, and did best over all of them.
{at_rest}{tempered}
| family | rate | {names} |
|---|---|{rules}|
{base}

## Validation
Mean gain in log((NDCG@10 + 0.02) / (popularity + 0.02)) of one controlled run over the base schedule, on slices of
domains that were never trained on ({validation_domains}), by model family and users of the largest slice. These chose
the released iteration, so they flatter it; test figures are in the README.

| figure | value |
|---|---|
{figures}

## Outcome model
Predicts log((NDCG@10 + 0.02) / (popularity + 0.02)) at the end of a run. On the validation domains, which stopped its
fit and set its temperature: share of outcomes inside its central intervals, of differences between two runs of a task
inside theirs, root mean square error beside that of always predicting the training mean, rank correlation within tasks.

| situation | 50 % | 80 % | 90 % | 95 % | differences 90 % | error | of the mean | rank |
|---|---|---|---|---|---|---|---|---|
{outcome}

## Limits
- Families other than those above have not been measured.
- Where a domain's descriptors leave the training range, actions shrink; far outside, the base schedule runs as it is.
- Trained for {epochs} epochs, at {horizons} optimizer steps, and 20 decisions.
"""


_ACTS = {
    "cued": "learning rate is raised, up to three times, while the validation metric rises by much",
    "decay_cued": "weight decay is raised or lowered, up to four times, by how much of what is learnt is memorised",
}
"""What the cues of a `ControllerConfig` do, by its field."""


def _cue(measured: Mapping[str, Any], family: str) -> str:
    return f"{measured['gains'][family]:+.3f} for {family} on {measured['domains'][family]} of them"


def write_model_card(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the card beside a checkpoint, from its provenance alone."""
    provenance, config = checkpoint.provenance, checkpoint.config
    training = provenance["meta_training"]
    steps = [bound for bounds in training["steps_range"] for bound in bounds]
    rows = []
    for row, family in enumerate(config.rows):
        for decays, rate in ((0, "held"), (1, "decays")):
            units = zip(CONTROLLED, checkpoint.base[row, decays].tolist(), strict=True)
            cells = [f"{config.space[name].decode(unit):.4g}" for name, unit in units]
            rows.append("| " + " | ".join((family, rate, *cells)) + " |")
    calibration = provenance["outcome"]["calibration"]
    at_rest = f"""
The policy is at rest for {", ".join(config.at_rest)}: for those of them that it was trained on (above) it did worse
than the base on validation domains. Their bases were chosen by runs on whole domains (`scripts/choose_base.py`; where
they are given in `bases.json` beside this, on which).
"""
    for field, acts in _ACTS.items():
        families, measured = getattr(config, field), provenance.get(field)
        if measured is not None and families:
            at_rest += f"""
Not all of them are left at their base: of {", ".join(families)} the
{acts} (`metalearn.controller.cues`).
Measured on whole meta-training domains (`scripts/choose_cue.py`), in log(NDCG@10 + 0.02):
{", ".join(_cue(measured, family) for family in families)}.
"""
    released = provenance.get("tempered")
    tempered = (
        ""
        if released is None
        else f"""
How far the rate decays, and that the policy's in-run actions are {released["policy_share"]:g} of what it has learnt,
was chosen by runs on whole domains ({", ".join(released["domains"])}; `scripts/choose_release.py`): a gain of
{released["gain"]:+.4f} in log(NDCG@10 + 0.02).
"""
    )
    path.write_text(
        _TEMPLATE.format(
            decayed=config.decay_to,
            tempered=tempered,
            sizes=", ".join(
                f"{b['learner']} {b['users']} x {b['items']} (d {b['dim']}, batch {b['batch']})"
                for b in provenance["buckets"]
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
            at_rest=at_rest if config.at_rest else "",
            validation_domains=", ".join(provenance["validation_domains"]) or "simulated ones",
            figures="\n".join(f"| {name} | {value:+.4f} |" for name, value in provenance["validation"].items()),
            outcome="\n".join(
                f"| {name} | "
                + " | ".join(f"{share:.2f}" for share in found["coverage"].values())
                + f" | {found['improvement_coverage']['90']:.2f} | {found['rmse']:.3f} | {found['rmse_of_mean']:.3f} "
                + f"| {found['spearman']:.2f} |"
                for name, found in calibration.items()
            ),
            epochs=" to ".join(f"{bound:g}" for bound in training["epochs_range"]),
            horizons=f"{min(steps) * config.num_decisions} to {max(steps) * config.num_decisions}",
        )
    )
