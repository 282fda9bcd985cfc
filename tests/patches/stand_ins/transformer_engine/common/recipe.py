"""Recipes of FP8; Megatron-core inherits from one."""

__all__ = ["DelayedScaling"]


class DelayedScaling:
    """Never used."""
