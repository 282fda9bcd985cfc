"""The version of megacomp; ranks compare it when they agree on a configuration."""

__version__ = "0.1.0"
