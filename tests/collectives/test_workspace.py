"""Workspaces are reused, grow, belong to one thread, and serve calls in and out of inference mode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from megacomp.collectives.workspace import take

CPU = torch.device("cpu")


def _address(*shapes: tuple[int, ...]) -> int:
    return take("sums", shapes, CPU)[0].untyped_storage().data_ptr()


def test_a_buffer_is_kept_until_a_larger_one_is_needed() -> None:
    with ThreadPoolExecutor(1) as thread:  # a thread of its own starts without buffers
        large = thread.submit(_address, (100, 64)).result()
        assert thread.submit(_address, (10, 64), (3, 8)).result() == large
        assert thread.submit(lambda: take("sums", [(200, 64)], CPU)[0].shape).result() == (200, 64)


def test_parts_follow_one_another_without_overlap() -> None:
    parts = take("gathered", [(2, 3, 8), (0, 8), (5, 8)], CPU)
    assert [tuple(part.shape) for part in parts] == [(2, 3, 8), (0, 8), (5, 8)]
    for value, part in enumerate(parts):
        part.fill_(value)
    assert [part.unique().tolist() for part in parts] == [[0], [], [2]]


def test_threads_do_not_share() -> None:
    own = _address((4, 64))
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(_address, (4, 64)).result() != own


def test_born_in_inference_mode_usable_outside() -> None:
    def fill() -> None:
        with torch.inference_mode():
            take("sums", [(8, 8)], CPU)[0].fill_(1)
        take("sums", [(8, 8)], CPU)[0].fill_(2)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(fill).result()


def test_the_default_device_of_torch_plays_no_part() -> None:
    def take_one() -> torch.device:
        with torch.device("meta"):
            return take("sums", [(8, 8)], CPU)[0].device

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(take_one).result() == CPU
