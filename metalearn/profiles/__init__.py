"""Profiles of domains: a fixed vector of meta-features, known before training, and an identity hash."""

from metalearn.profiles.domain_profile import DomainProfile
from metalearn.profiles.meta_features import META_FEATURE_NAMES, SAMPLED_META_FEATURES, SCHEMA_VERSION
from metalearn.profiles.profiling import profile_domain

__all__ = ["META_FEATURE_NAMES", "SAMPLED_META_FEATURES", "SCHEMA_VERSION", "DomainProfile", "profile_domain"]
