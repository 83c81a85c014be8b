"""Tuned quality at the price of one run: a pretrained controller of hyperparameters for recommenders in PyTorch.

Example:
  >>> import metalearn
  >>> rows = metalearn.Interactions.from_arrays([0, 0, 1, 1], ["a", "b", "b", "c"])
  >>> metalearn.profile_domain(rows)["log_density"] is not None
  True
"""

from metalearn.controller import Controller, Decision, load_controller
from metalearn.errors import MetalearnError
from metalearn.interactions import Interactions
from metalearn.profiles import DomainProfile, profile_domain
from metalearn.session import Session

__version__ = "0.1.0"

__all__ = [
    "Controller",
    "Decision",
    "DomainProfile",
    "Interactions",
    "MetalearnError",
    "Session",
    "load_controller",
    "profile_domain",
]
