"""How loops in Python are compiled."""

import numba


def njit(**options):
    """Numba's decorator, which keeps what it compiled where it can.

    That is beside the source, or else in the user's folder for caches or that
    which NUMBA_CACHE_DIR names. Where none of these can be written to, loops
    are compiled anew at each start.

    Arguments
    ---------
    **options
        As of `numba.njit`.

    Returns
    -------
    callable
    """

    def compile_function(function):
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(**options)(function)

    return compile_function
