"""FP8 is never enabled."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"]


class FP8GlobalStateManager:
    """The state of FP8: off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


@contextmanager
def fp8_autocast(**_: object) -> Iterator[None]:
    yield


fp8_model_init = fp8_autocast
