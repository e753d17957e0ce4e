"""Loops are compiled where compiled code can be kept, and where it cannot."""

import numba

from compiled import njit


def test_nowhere_to_keep_code(monkeypatch):
    """As of a container that may write neither beside the code nor at home."""

    def nowhere(cache=False, **options):
        def compile_function(function):
            if cache:
                raise RuntimeError("no locator available")
            return real(**options)(function)

        return compile_function

    real = numba.njit
    monkeypatch.setattr(numba, "njit", nowhere)
    assert njit(nogil=True)(lambda x: x + 1)(2) == 3


def test_code_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert njit(nogil=True)(lambda x: x + 1)(2) == 3
    assert list(tmp_path.rglob("*.nbi"))
