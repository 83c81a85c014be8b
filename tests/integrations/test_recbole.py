"""RecBole: the contract on its own BPR, Trainer and loaders, and a run of each of the four models that are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from envs.domains import Domain
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.torch import MetaScheduler
from tests.integrations.contract import (
    CHECKS,
    DECAY_EVERY,
    EPOCH,
    EPOCHS,
    Job,
    Outcome,
    Step,
    accumulated_micro_batches_are_one_step,
    values,
)

pytest.importorskip("recbole", reason="RecBole is not installed")
from metalearn.integrations.recbole import FAMILIES, WEIGHTS_KEY, patch_recbole, profile_training_data, steer

pytestmark = pytest.mark.filterwarnings("ignore")  # RecBole is of 2023: deprecations by the dozen
LOADED = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
MODELS: dict[str, dict[str, Any]] = {
    "BPR": {},
    "SASRec": {"train_neg_sample_args": None, "hidden_size": 8, "inner_size": 8},
    "LightGCN": {},
    "DeepFM": {
        "threshold": {"rating": 3},
        "metrics": ["AUC"],
        "valid_metric": "AUC",
        "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "RO", "group_by": "none", "mode": "labeled"},
        "load_col": {**LOADED, "item": ["item_id", "genres"]},
    },
}


def write_dataset(domain: Domain, folder: Path) -> None:
    """Write a domain's training interactions, and genres of its items, as RecBole's atomic files."""
    rows = domain.train
    path = folder / "small" / "small.inter"
    path.parent.mkdir(exist_ok=True)
    lines = [
        f"{user}\t{item}\t{1 + index % 5}\t{index}"
        for index, (user, item) in enumerate(zip(rows.user, rows.item, strict=True))
    ]
    items = [f"{item}\t{' '.join('abc'[: 1 + item % 3])}" for item in sorted(set(rows.item.tolist()))]
    path.with_suffix(".item").write_text("item_id:token\tgenres:token_seq\n" + "\n".join(items), encoding="utf8")
    path.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(lines), encoding="utf8")


@pytest.fixture(autouse=True)
def without_arguments(monkeypatch: pytest.MonkeyPatch):
    """RecBole's config reads the command line."""
    monkeypatch.setattr("sys.argv", ["recbole"])


def prepared(job: Job, model: str = "BPR") -> SimpleNamespace:
    """Do as RecBole's quick start does, up to the Trainer."""
    patch_recbole()
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    write_dataset(job.domain, job.folder)
    num_rows = len(job.domain.train.user)
    settings = {
        "data_path": str(job.folder),
        "checkpoint_dir": str(job.folder / "saved"),
        "epochs": EPOCHS,
        "train_batch_size": -(-num_rows * 8 // 10 // EPOCH),
        "embedding_size": 8,
        "learner": "adamw",
        "load_col": LOADED,
        "use_gpu": False,
        "show_progress": False,
        "state": "ERROR",
        **MODELS[model],
    }
    config = Config(model=model, dataset="small", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    made = get_model(config["model"])(config, train._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, made)
    return SimpleNamespace(config=config, train=train, valid=valid, test=test, model=made, trainer=trainer)


class Watched:
    """A Trainer beside a learning-rate schedule; every epoch begins from a seed, since RecBole saves no generators."""

    def __init__(self, job: Job) -> None:
        parts = self.parts = prepared(job)
        trainer = self.trainer = parts.trainer
        if job.attached_before:
            MetaScheduler(trainer.optimizer, **job.scheduler_options)
        self.decay = torch.optim.lr_scheduler.StepLR(trainer.optimizer, DECAY_EVERY, gamma=0.5)
        self.steps: list[Step] = []
        self.rates: list[list[float]] = []
        train_epoch = trainer._train_epoch

        def seeded(train_data: Any, epoch: int, **options: Any) -> Any:
            self.seed(epoch)
            return train_epoch(train_data, epoch, **options)

        trainer._train_epoch = seeded

    def seed(self, epoch: int) -> None:
        self.parts.train.generator.manual_seed(epoch)
        torch.manual_seed(epoch)
        np.random.seed(epoch)  # noqa: NPY002

    def watch(self, scheduler: MetaScheduler | None) -> None:
        """Begin to note steps."""
        optimizer, check_nan, own = self.trainer.optimizer, self.trainer._check_nan, []

        def note_own(loss: Any) -> None:
            own[:] = values(optimizer)
            check_nan(loss)

        def note(*_: Any) -> None:
            self.steps.append(
                Step(
                    own=list(own) or values(optimizer),
                    in_force=values(optimizer),
                    decision=None if scheduler is None else scheduler.decision,
                    multiplier=1.0 if scheduler is None else scheduler.multiplier(scheduler.steps),
                    dropout=0.0,
                )
            )

        def decay(*_: Any) -> None:
            self.decay.step()
            self.rates.append([group["lr"] for group in optimizer.param_groups])

        self.trainer._check_nan = note_own
        optimizer.register_step_pre_hook(note)
        optimizer.register_step_post_hook(decay)

    def outcome(self, scheduler: MetaScheduler | None) -> Outcome:
        return Outcome(
            weights=[parameter.detach().clone() for parameter in self.parts.model.parameters()],
            scheduler=scheduler,
            steps=self.steps,
            other_rates=self.rates,
            dropout=0.0,
            epoch=len(self.parts.train),
        )


def run(job: Job) -> Outcome:
    """Train with RecBole's Trainer."""
    watched, scheduler = Watched(job), None
    parts, trainer = watched.parts, watched.trainer
    if job.controller is not None:
        scheduler = steer(trainer, parts.train, **job.scheduler_options)
    watched.watch(scheduler)
    file = job.folder / "half.pth"

    def save(epoch: int, score: float) -> None:
        if job.save and epoch == 0:
            trainer._save_checkpoint(epoch, verbose=False, saved_model_file=file)
            torch.save(watched.decay.state_dict(), file.with_suffix(".decay"))

    if job.resume:
        trainer.resume_checkpoint(file)
        watched.decay.load_state_dict(torch.load(file.with_suffix(".decay"), weights_only=True))
    trainer.fit(parts.train, parts.valid, verbose=False, saved=False, callback_fn=save)
    return watched.outcome(scheduler)


def plain(job: Job) -> Outcome:
    """Train RecBole's model in a loop of our own."""
    watched = Watched(job)
    parts, trainer = watched.parts, watched.trainer
    optimizer, train = trainer.optimizer, parts.train
    options = {
        "horizon": EPOCHS * len(train),
        "batch_size": round(job.domain.profile.num_interactions / len(train)),
        "metric": "mrr@10",
        "averaging": True,
        **job.scheduler_options,
    }
    scheduler = MetaScheduler(optimizer, model=parts.model, family="matrix_factorization", **options)
    watched.watch(scheduler)
    trainer.eval_collector.data_collect(train)
    for epoch in range(EPOCHS):
        watched.seed(epoch)
        parts.model.train()
        for batch in train:
            optimizer.zero_grad()
            loss = parts.model.calculate_loss(batch)
            trainer._check_nan(loss)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
        with scheduler.averaged_parameters():
            _, result = trainer._valid_epoch(parts.valid)
        scheduler.report(result)
    return watched.outcome(scheduler)


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_contract(check: Any, job: Job):
    if check is accumulated_micro_batches_are_one_step:
        pytest.skip("RecBole does not accumulate gradients")
    check(run, plain, job)


@pytest.mark.parametrize("name", MODELS)
def test_models_run_unchanged(name: str, job: Job):
    parts = prepared(job, name)
    optimizer, forces = parts.trainer.optimizer, []
    scheduler = steer(parts.trainer, parts.train, controller=job.controller, interval=2)
    optimizer.register_step_pre_hook(
        lambda *_: forces.append((scheduler.decision, scheduler.multiplier(scheduler.steps), values(optimizer)))
    )
    parts.trainer.fit(parts.train, parts.valid, verbose=False)
    result = parts.trainer.evaluate(parts.test)  # loads the best model's checkpoint
    known = FAMILIES[name] in job.controller.config.families
    profile = profile_training_data(parts.train)
    first = MetaScheduler(
        torch.optim.AdamW(parts.model.parameters(), lr=parts.config["learning_rate"], weight_decay=0.0),
        model=parts.model,
        domain=profile,
        batch_size=round(profile.num_interactions / len(parts.train)),
        family=FAMILIES[name] if known else None,
        horizon=EPOCHS * len(parts.train),
        averaging=True,
        interval=2,
        controller=job.controller,
    ).decision
    assert scheduler.decisions[0].groups == first.groups
    assert scheduler.steps == len(forces) == EPOCHS * len(parts.train)
    assert len(scheduler.decisions) > 4
    for decision, factor, (group,) in forces:
        assert group["lr"] == pytest.approx(decision.groups[0]["learning_rate"] * factor, rel=1e-12)
    assert all(np.isfinite(value) for value in result.values())
    assert scheduler.steps == EPOCHS * len(parts.train)  # the checkpoint's earlier state was not taken


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_what_is_evaluated_and_saved_is_averaged_and_training_goes_on_from_the_weights(job: Job):
    parts = prepared(job)
    trainer, evaluate, seen = parts.trainer, parts.trainer.evaluate, []

    def spied(*arguments: Any, **keywords: Any) -> Any:
        seen.append(weights_of(parts.model))
        return evaluate(*arguments, **keywords)

    trainer.evaluate = spied
    scheduler = steer(trainer, parts.train, controller=job.controller)
    trainer.fit(parts.train, parts.valid, verbose=False)
    raw = weights_of(parts.model)
    with scheduler.averaged_parameters():
        average = weights_of(parts.model)
    assert not all(map(torch.equal, raw, average))
    assert all(map(torch.equal, seen[-1], average))  # of the last epoch's validation
    trainer.evaluate(parts.valid, load_best_model=False)
    assert all(map(torch.equal, seen[-1], average)) and all(map(torch.equal, weights_of(parts.model), raw))
    trainer._save_checkpoint(EPOCHS - 1, verbose=False)
    saved = torch.load(trainer.saved_model_file, weights_only=False)["state_dict"]
    assert all(map(torch.equal, saved.values(), average)) and all(map(torch.equal, weights_of(parts.model), raw))
    again = prepared(job)
    steer(again.trainer, again.train, controller=job.controller)
    again.trainer.resume_checkpoint(trainer.saved_model_file)
    assert all(map(torch.equal, weights_of(again.model), raw))


def test_with_averaging_off_the_rate_decays_and_weights_are_as_they_are(job: Job):
    parts = prepared(job)
    scheduler = steer(parts.trainer, parts.train, controller=job.controller, averaging=False)
    parts.trainer.fit(parts.train, parts.valid, verbose=False)
    assert scheduler.multiplier(scheduler.steps - 1) < 0.5
    parts.trainer._save_checkpoint(EPOCHS - 1, verbose=False)
    saved = torch.load(parts.trainer.saved_model_file, weights_only=False)
    assert all(map(torch.equal, saved["state_dict"].values(), weights_of(parts.model)))
    assert saved["other_parameter"][WEIGHTS_KEY] == []  # nothing is kept twice
    again = prepared(job)
    steer(again.trainer, again.train, controller=job.controller)
    with pytest.raises(SessionError, match="start it with the arguments of the saved run"):
        again.trainer.resume_checkpoint(parts.trainer.saved_model_file)


def test_the_profile_is_of_the_training_interactions(job: Job):
    parts = prepared(job)
    table = parts.train._dataset.inter_feat
    pairs = set(zip(table["user_id"].tolist(), table["item_id"].tolist(), strict=True))
    profile = profile_training_data(parts.train)
    assert profile.num_interactions == len(table["user_id"])
    assert profile.num_users == len({user for user, _ in pairs})
    assert profile.num_items == len({item for _, item in pairs})


def test_a_checkpoint_without_a_scheduler_is_refused(job: Job):
    free = prepared(job)
    free.trainer.fit(free.train, free.valid, verbose=False)
    steered = prepared(job)
    steer(steered.trainer, steered.train, controller=job.controller)
    with pytest.raises(InvalidArgumentError, match="this checkpoint was saved without a MetaScheduler"):
        steered.trainer.resume_checkpoint(free.trainer.saved_model_file)


def test_wrong_uses_are_told(job: Job):
    parts = prepared(job)
    with pytest.raises(InvalidArgumentError, match="`trainer` must be a RecBole Trainer, got int"):
        steer(3, parts.train)
    with pytest.raises(InvalidArgumentError, match="`averaging`"):
        steer(parts.trainer, parts.train, horizon=None, averaging=False)
    parts.config["single_spec"] = False
    with pytest.raises(InvalidArgumentError, match="run with nproc=1"):
        steer(parts.trainer, parts.train)


def test_missing_values_are_filled_under_pandas_3(job: Job):
    write_dataset(job.domain, job.folder)
    path = job.folder / "small" / "small.inter"
    head, first, *rest = path.read_text(encoding="utf8").splitlines()
    user, item, _, time = first.split("\t")
    path.write_text("\n".join([head, "\t".join([user, item, "", time]), *rest]), encoding="utf8")
    patch_recbole()
    from recbole.config import Config
    from recbole.data import create_dataset

    settings = {"data_path": str(job.folder), "use_gpu": False, "load_col": None, "normalize_all": False}
    dataset = create_dataset(Config(model="BPR", dataset="small", config_dict=settings))
    given = np.array([int(line.split("\t")[2]) for line in rest])
    ratings = np.asarray(dataset.inter_feat["rating"])
    assert np.isfinite(ratings).all()
    assert given.mean() == pytest.approx(ratings.sum() / len(ratings), rel=1e-5)


def test_torch_loads_as_before(job: Job, tmp_path: Path):
    patch_recbole()
    torch.save(SimpleNamespace(), tmp_path / "object")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        torch.load(tmp_path / "object")
