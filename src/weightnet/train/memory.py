"""What the C library does with memory that a training step frees."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next step.

    By default glibc gives large pieces back to the system, which clears each page anew when the next step asks for
    them: up to a quarter of a step on a CPU (docs/training.md). Peak memory grows by a few percent. This holds for the
    whole process, so it is for programs, not for libraries, to call; without glibc nothing changes.

    Returns: whether it does so from now on.

    Source: mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # other C libraries; other systems
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
