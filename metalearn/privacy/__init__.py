"""Profiles under differential privacy, and the ledger that accounts for them; needs the extra `metalearn[privacy]`."""

from metalearn.privacy.ledger import Charge, PrivacyLedger
from metalearn.privacy.release import release_profile

__all__ = ["Charge", "PrivacyLedger", "release_profile"]
