import diffult  # noqa: F401  (before torch, which the modules import first)
