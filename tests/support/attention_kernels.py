"""Attention by its CUDA kernels, in the emulator or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

from almostgpt import kernels

# Cards whose blocks have 163, 99 and 227 KiB of shared memory: each has tiles of its own.
CARDS = [(8, 0), (8, 6), (9, 0)]


def attend_on(backend: tuple[int, int] | str, deterministic: bool = False) -> Callable:
    """``attend(q, k, v, **options)`` by the kernels, and never by the reference: (out, lse).

    Args:
        backend: the card that the emulator plays, or ``"cuda"``.
        deterministic: the ordered backward.
    """
    forced = {"backend": "cuda"} if backend == "cuda" else {"backend": "emulator"}
    if backend != "cuda":
        forced["capability"] = backend

    def attend(q, k, v, **options):
        with kernels.use_backend(**forced, ops=["flash_attention"]):
            return kernels.flash_attention(
                q, k, v, return_lse=True, deterministic=deterministic, **options
            )

    return attend
