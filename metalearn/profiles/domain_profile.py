"""DomainProfile: the meta-features of one domain, in the fixed order that a controller expects."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.profiles.meta_features import META_FEATURE_NAMES, SCHEMA_VERSION

_COUNTS = ("num_users", "num_items", "num_interactions")
_KEYS = ("schema_version", "fingerprint", *_COUNTS, "sampled_fraction", "meta_features")


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainProfile:
    """Hold the meta-features of a domain; made by `profile_domain`.

    Args:
      values: float64 [M], in the order of `names`; 0 where undefined.
      mask: bool [M], False where the meta-feature is undefined (for example, temporal ones without times).
      fingerprint: identity hash of what was profiled; never an input of a model.
      num_users: users that occur.
      num_items: items that occur.
      num_interactions: interactions of the whole domain.
      sampled_fraction: share of the interactions that `SAMPLED_META_FEATURES` are from, in (0, 1]; the others are
        from all of them.
      names: META_FEATURE_NAMES of this schema version.
      schema_version: version of the set of meta-features and their definitions.

    Raises:
      InvalidArgumentError: wrong length, a value that is not finite, or an unknown schema.

    Example:
      >>> from metalearn.interactions import Interactions
      >>> from metalearn.profiles import profile_domain
      >>> profile = profile_domain(Interactions.from_arrays([1, 1, 2, 2], [5, 6, 6, 6]))
      >>> profile["repeat_share"], profile["temporal_burstiness"]
      (0.25, None)
      >>> DomainProfile.from_json(profile.to_json()).fingerprint == profile.fingerprint
      True
    """

    values: np.ndarray
    mask: np.ndarray
    fingerprint: str
    num_users: int
    num_items: int
    num_interactions: int
    sampled_fraction: float = 1.0
    names: tuple[str, ...] = META_FEATURE_NAMES
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise InvalidArgumentError(
                f"`schema_version` is {self.schema_version}; this version of metalearn knows {SCHEMA_VERSION}; "
                "compute the profile again with profile_domain"
            )
        if tuple(self.names) != META_FEATURE_NAMES:
            raise InvalidArgumentError(f"`names` must be META_FEATURE_NAMES, differs in {_difference(self.names)}")
        mask = np.array(self.mask, dtype=bool)
        values = np.array(self.values, dtype=np.float64)
        for name, array in (("values", values), ("mask", mask)):
            if array.shape != (len(META_FEATURE_NAMES),):
                raise InvalidArgumentError(f"`{name}` must have shape ({len(META_FEATURE_NAMES)},), got {array.shape}")
        if not np.isfinite(values[mask]).all():
            name = META_FEATURE_NAMES[int(np.argmax(mask & ~np.isfinite(values)))]
            raise InvalidArgumentError(f"`values` must be finite where `mask` is set; {name!r} is not; mask it instead")
        values[~mask] = 0.0
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "names", META_FEATURE_NAMES)

    def __getitem__(self, name: str) -> float | None:
        """Return a meta-feature by name, None where it is undefined.

        Raises:
          InvalidArgumentError: there is no such meta-feature; the message lists the nearest names.
        """
        if name not in self.names:
            near = difflib.get_close_matches(str(name), self.names, n=5, cutoff=0.4)
            raise InvalidArgumentError(f"no meta-feature {name!r}; nearest are {near}; all are in META_FEATURE_NAMES")
        index = self.names.index(name)
        return float(self.values[index]) if self.mask[index] else None

    def __repr__(self) -> str:
        sampled = "" if self.sampled_fraction == 1 else f", {self.sampled_fraction:.2%} sampled"
        return (
            f"DomainProfile({self.num_interactions} interactions of {self.num_users} users and {self.num_items} items"
            f"{sampled}, {int(self.mask.sum())} of {len(self.names)} meta-features, {self.fingerprint[:12]})"
        )

    def as_dict(self) -> dict[str, float | None]:
        """Return name to value, None where undefined, in schema order."""
        return {name: self[name] for name in self.names}

    def to_json(self) -> str:
        """Write the profile as JSON text; `from_json` gives the same bits back."""
        content = {
            "schema_version": self.schema_version,
            "fingerprint": self.fingerprint,
            **{name: int(getattr(self, name)) for name in _COUNTS},
            "sampled_fraction": float(self.sampled_fraction),
            "meta_features": self.as_dict(),
        }
        return json.dumps(content, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> DomainProfile:
        """Read a profile written by `to_json`.

        Raises:
          InvalidArgumentError: not such a text, another schema version, or unknown or missing meta-features.
        """
        content = _parse(text)
        features = content["meta_features"]
        if not isinstance(features, Mapping) or set(features) != set(META_FEATURE_NAMES):
            names = features if isinstance(features, Mapping) else ()
            raise InvalidArgumentError(
                f"the profile's meta-features differ from schema {SCHEMA_VERSION} in {_difference(names)}; "
                "compute the profile again with profile_domain"
            )
        for name, value in features.items():
            if not (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
                raise InvalidArgumentError(f"meta-feature {name!r} must be a number or null, got {value!r}")
        return cls(
            values=np.array([features[name] or 0.0 for name in META_FEATURE_NAMES], dtype=np.float64),
            mask=np.array([features[name] is not None for name in META_FEATURE_NAMES]),
            fingerprint=str(content["fingerprint"]),
            sampled_fraction=float(content["sampled_fraction"]),
            schema_version=content["schema_version"],
            num_users=int(content["num_users"]),
            num_items=int(content["num_items"]),
            num_interactions=int(content["num_interactions"]),
        )


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"`text` is not JSON: {error}; pass what DomainProfile.to_json wrote") from error
    if not isinstance(content, dict) or "schema_version" not in content:
        raise InvalidArgumentError("`text` is not a domain profile; pass what DomainProfile.to_json wrote")
    if content["schema_version"] != SCHEMA_VERSION:
        raise InvalidArgumentError(
            f"the profile has schema version {content['schema_version']}; this version of metalearn reads "
            f"{SCHEMA_VERSION}; compute the profile again with profile_domain"
        )
    if set(content) != set(_KEYS):
        raise InvalidArgumentError(
            f"a domain profile has the keys {list(_KEYS)}; missing are {sorted(set(_KEYS) - set(content))}, "
            f"unknown are {sorted(set(content) - set(_KEYS))}"
        )
    return content


def _difference(names: Any) -> str:
    given = set(names)
    unknown, missing = sorted(given - set(META_FEATURE_NAMES)), sorted(set(META_FEATURE_NAMES) - given)
    return f"unknown {unknown}, missing {missing}"
