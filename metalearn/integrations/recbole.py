"""RecBole: its own Trainer, as it is, under the controller.

from metalearn.integrations.recbole import patch_recbole, steer

patch_recbole()  # before RecBole is imported; see there what for
from recbole.config import Config
...  # RecBole's quick start, with `learner: adamw` in the config
trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
scheduler = steer(trainer, train_data)
trainer.fit(train_data, valid_data)
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial, wraps
from typing import Any, Unpack

import numpy as np
import torch

from metalearn.controller.controller import Controller, load_controller
from metalearn.errors import InvalidArgumentError
from metalearn.integrations.options import Found, SchedulerOptions, check_options, complete_options
from metalearn.interactions import Interactions
from metalearn.profiles import DomainProfile, profile_domain
from metalearn.torch import MetaScheduler
from metalearn.torch.arguments import check_averaging

FAMILIES: Mapping[str, str] = {
    "BPR": "matrix_factorization",
    "SASRec": "self_attention",
    "LightGCN": "graph_convolution",
    "DeepFM": "click_model",
}
"""RecBole's models by the controller's families; any other model is steered from the base for unknown ones."""
STATE_KEY, WEIGHTS_KEY = "metalearn_scheduler", "metalearn_weights"
"""Of the scheduler's state, and of the weights that training goes on from, among a checkpoint's `other_parameter`."""


@cache
def patch_recbole() -> None:
    """Makes RecBole 1.2.1 run on current NumPy, SciPy, PyTorch and pandas; call it before RecBole is imported.

    RecBole was last released for older ones. In this process

    - `numpy` gets back the names `float_`, `complex_` and `unicode_`, which RecBole aliases at import;
    - SciPy's `dok_matrix` gets back `_update`, with which graph models fill their adjacency;
    - `ray` and `ray.tune`, which RecBole imports and only its hyperparameter search uses, are empty modules where Ray
      is not installed;
    - `Trainer.evaluate`, `Trainer.resume_checkpoint` and `load_data_and_model` load with `weights_only=False`, since
      RecBole's checkpoints hold a pickled `Config`: loading one executes what it says, so load only your own. Outside
      of them `torch.load` stays as it is;
    - missing values are filled in a way that pandas 3 does not ignore;
    - while it processes a table, `Series.agg(len)` is of each element, as before pandas 3: it splits lists of tokens,
      such as ml-100k's genres, by that.

    A second call does nothing.

    Raises:
      ImportError: RecBole is not installed.
    """
    if importlib.util.find_spec("recbole") is None:
        raise ImportError("RecBole is not installed: pip install --no-deps recbole; see docs/integrations.md")
    for name, kind in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
        if name not in vars(np):
            setattr(np, name, kind)
    if "ray" not in sys.modules and importlib.util.find_spec("ray") is None:
        ray, tune = types.ModuleType("ray"), types.ModuleType("ray.tune")
        ray.tune = tune  # type: ignore[attr-defined]
        sys.modules.update({"ray": ray, "ray.tune": tune})

    from scipy.sparse import dok_matrix

    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda matrix, entries: matrix._dict.update(entries)  # type: ignore[attr-defined]

    from pandas import Series
    from recbole import quick_start  # pyright: ignore[reportAttributeAccessIssue]
    from recbole.data.dataset.dataset import Dataset  # pyright: ignore[reportMissingImports]
    from recbole.data.dataset.sequential_dataset import SequentialDataset  # pyright: ignore[reportMissingImports]
    from recbole.trainer import Trainer  # pyright: ignore[reportMissingImports]

    Dataset._fill_nan = _filled_first(Dataset._fill_nan)
    for owner, name in ((Dataset, "_data_processing"), (SequentialDataset, "_benchmark_presets")):
        setattr(owner, name, _while(getattr(owner, name), Series, "agg", _of_elements))
    for owner, name in ((Trainer, "evaluate"), (Trainer, "resume_checkpoint"), (quick_start, "load_data_and_model")):
        setattr(owner, name, _while(getattr(owner, name), torch, "load", _unpickling))


def _while(function: Callable[..., Any], owner: Any, name: str, replace: Callable[[Any], Any]) -> Callable[..., Any]:
    """Wraps a function: while it runs, `owner.name` is what `replace` makes of it."""

    @wraps(function)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        own = getattr(owner, name)
        setattr(owner, name, replace(own))
        try:
            return function(*arguments, **keywords)
        finally:
            setattr(owner, name, own)

    return wrapper


def _unpickling(load: Callable[..., Any]) -> Callable[..., Any]:
    """Makes of `torch.load` one that loads RecBole's checkpoints."""
    return partial(load, weights_only=False)


def _of_elements(agg: Callable[..., Any]) -> Callable[..., Any]:
    """Makes of `Series.agg` one that takes `len` of each element."""

    @wraps(agg)
    def aggregate(series: Any, function: Any = None, *arguments: Any, **keywords: Any) -> Any:
        return series.map(len) if function is len else agg(series, function, *arguments, **keywords)

    return aggregate


def _filled_first(fill_nan: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wraps `Dataset._fill_nan`, whose `feat[field].fillna(inplace=True)` fills a copy under pandas 3."""

    def fill(dataset: Any) -> None:
        for name in dataset.feat_name_list:
            table = getattr(dataset, name)
            for field in table:
                kind = dataset.field2type[field].value
                if kind in ("token", "float") and table[field].isna().any():
                    table[field] = table[field].fillna(0 if kind == "token" else table[field].mean())
        fill_nan(dataset)

    return fill


def steer(trainer: Any, train_data: Any, **options: Unpack[SchedulerOptions]) -> MetaScheduler:
    """Puts a RecBole Trainer under the controller; then call its `fit` as ever.

    The Trainer keeps its class and its methods' results. Optimizer steps are seen by the optimizer's hooks, losses
    where the Trainer checks them for NaN, and validation results are reported. The domain is profiled from the training
    data, the horizon is `epochs` times the batches of one, the metric `valid_metric`, and the family follows from the
    model's name (`FAMILIES`) if the controller knows it; each can be given instead.

    What the Trainer evaluates and saves are averaged weights, and the rate is held. With `averaging=False` they are the
    weights as they are, and the rate decays over the horizon: choose `epochs` then as long as you mean to train, since
    it has not decayed where `stopping_step` ends a run.

    Checkpoints of the Trainer hold the scheduler's state, and the weights beside the averaged ones; call `steer` first,
    then `trainer.resume_checkpoint`.

    RecBole's default `learner: adam` has no decoupled weight decay; with `learner: adamw` it is controlled too.

    Args:
      trainer: a RecBole `Trainer`, made and not yet fitted.
      train_data: the loader that `fit` will get.
      **options: keyword arguments of MetaScheduler; all can be left out.

    Returns:
      The scheduler.

    Raises:
      InvalidArgumentError: this is no Trainer with one optimizer and one process, it is steered already, or an option
        is wrong.
    """
    checked = {"averaging": True, **check_options(options, needs_domain=False)}
    _check_trainer(trainer)
    profile = checked.pop("domain", None) or profile_training_data(train_data)
    controller = checked.pop("controller", None)
    loaded = controller if isinstance(controller, Controller) else load_controller(controller)
    checked.setdefault("family", loaded.config.known_family(FAMILIES.get(trainer.config["model"])))
    found = Found(
        steps=trainer.epochs * len(train_data),
        batch_size=max(1, round(profile.num_interactions / len(train_data))),
        metric=trainer.valid_metric,
        mode="max" if trainer.valid_metric_bigger else "min",
    )
    completed = complete_options(checked, found)
    averaging = check_averaging(completed["averaging"], completed["horizon"])
    scheduler = MetaScheduler(trainer.optimizer, model=trainer.model, controller=loaded, domain=profile, **completed)
    _follow_steps(trainer, scheduler)
    _follow_validation(trainer, scheduler)
    _follow_checkpoints(trainer, scheduler, averaging=averaging)
    return scheduler


def profile_training_data(train_data: Any) -> DomainProfile:
    """Returns the profile of the interactions behind a RecBole training loader.

    Args:
      train_data: as `recbole.data.data_preparation` returns it. A sequential model's has one interaction per row: the
        item that is to be predicted.
    """
    dataset = train_data._dataset
    columns = {
        role: _column(dataset, field)
        for role, field in (
            ("user", dataset.uid_field),
            ("item", dataset.iid_field),
            ("timestamp", dataset.time_field),
        )
    }
    return profile_domain(Interactions.from_arrays(columns["user"], columns["item"], timestamp=columns["timestamp"]))


def _column(dataset: Any, field: str | None) -> np.ndarray | None:
    table = dataset.inter_feat
    return None if field is None or field not in table else np.asarray(table[field])


def _check_trainer(trainer: Any) -> None:
    from recbole.trainer import Trainer  # pyright: ignore[reportMissingImports]

    if not isinstance(trainer, Trainer):
        raise InvalidArgumentError(f"`trainer` must be a RecBole Trainer, got {type(trainer).__name__}")
    if not isinstance(trainer.optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(f"{type(trainer).__name__} has no torch optimizer; nothing of it can be steered")
    if not trainer.config["single_spec"]:
        raise InvalidArgumentError(
            "a run of several processes is not steered by this adapter, whose checkpoints hold one's state; "
            "run with nproc=1"
        )


def _follow_steps(trainer: Any, scheduler: MetaScheduler) -> None:
    check_nan, loss, told = trainer._check_nan, None, scheduler.steps

    def see_loss(value: Any) -> None:
        nonlocal loss
        check_nan(value)
        loss = value.detach()

    def after_step(*_: Any) -> None:
        nonlocal told
        if scheduler.steps != told and loss is not None:  # after the scheduler's own hook, once a step
            scheduler.step(loss)
            told = scheduler.steps

    trainer._check_nan = see_loss
    trainer.optimizer.register_step_post_hook(after_step)


def _follow_validation(trainer: Any, scheduler: MetaScheduler) -> None:
    valid_epoch, evaluate = trainer._valid_epoch, trainer.evaluate

    def report(*arguments: Any, **keywords: Any) -> Any:
        score, result = valid_epoch(*arguments, **keywords)
        scheduler.report(result)
        return score, result

    @wraps(evaluate)
    def evaluate_averaged(eval_data: Any, load_best_model: bool = True, *arguments: Any, **keywords: Any) -> Any:
        # The best model's checkpoint holds averaged weights; loading it replaces those of the run.
        with nullcontext() if load_best_model else scheduler.averaged_parameters():
            return evaluate(eval_data, load_best_model, *arguments, **keywords)

    trainer._valid_epoch, trainer.evaluate = report, evaluate_averaged


def _follow_checkpoints(trainer: Any, scheduler: MetaScheduler, *, averaging: bool) -> None:
    model, resume, save = trainer.model, trainer.resume_checkpoint, trainer._save_checkpoint
    own_parameter, load_parameter = model.other_parameter, model.load_other_parameter
    held: list[tuple[Mapping[str, Any], Sequence[torch.Tensor]]] = []
    weights: list[torch.Tensor] = []

    @wraps(save)
    def save_checkpoint(*arguments: Any, **keywords: Any) -> None:
        weights[:] = [parameter.detach().clone() for parameter in model.parameters() if averaging]
        with scheduler.averaged_parameters():
            save(*arguments, **keywords)
        weights.clear()

    def other_parameter() -> dict[str, Any]:
        return {**own_parameter(), STATE_KEY: scheduler.state_dict(), WEIGHTS_KEY: list(weights)}

    def load_other_parameter(parameter: Mapping[str, Any] | None) -> None:
        # `evaluate` comes here too, for the best model: that brings no earlier state of the run back.
        rest = dict(parameter or {})
        held[:] = [(rest.pop(STATE_KEY), rest.pop(WEIGHTS_KEY, ()))] if STATE_KEY in rest else []
        load_parameter(rest)

    @wraps(resume)
    def resume_checkpoint(*arguments: Any, **keywords: Any) -> None:
        resume(*arguments, **keywords)
        if not held:
            raise InvalidArgumentError(
                "this checkpoint was saved without a MetaScheduler; resume it in a Trainer that is not steered"
            )
        ((state, saved),) = held
        scheduler.load_state_dict(state)
        with torch.no_grad():
            for parameter, value in zip(model.parameters() if saved else (), saved, strict=True):
                parameter.copy_(value)

    model.other_parameter, model.load_other_parameter = other_parameter, load_other_parameter
    trainer.resume_checkpoint, trainer._save_checkpoint = resume_checkpoint, save_checkpoint
