# SPDX-License-Identifier: Apache-2.0
"""
How every script starts: it reads its command line before torch is imported, so that --help and mistakes are answered at
once.

Importing the package registers its classes with transformers' Auto classes, which imports torch: seconds. Its modules
for command lines need none of that, but Python imports a package before its modules. So a script reads its command line
with the package's modules alone, and imports the package itself when it knows what to do:

    def main() -> None:
        with before_torch():
            from modeling_vit_scratch.evaluation.arguments import parse_arguments

            arguments = parse_arguments()
        ...

    if __name__ == "__main__":
        raise SystemExit(run_command_line(main))
"""

import ctypes
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


PACKAGE = "modeling_vit_scratch"

# Before torch is imported: threads that spin while they wait make a CPU with other work ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Settings of glibc's mallopt: M_MMAP_THRESHOLD, up to which memory comes from the heap, at most 32 MB; and
# M_TRIM_THRESHOLD, from which the heap's free end goes back to the system.
_MALLOPT = ((-3, 32 << 20), (-1, 2**31 - 1))


def _keep_freed_memory() -> None:
    """
    Lets the C library keep what a training step frees for the next one. By default it gives it back, and the system
    clears each page again: a tenth of a step on a CPU. Who has set MALLOC_... or GLIBC_TUNABLES keeps these settings.
    """
    is_set = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or is_set:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for number, value in _MALLOPT:
            mallopt(number, value)


_keep_freed_memory()


@contextmanager
def before_torch() -> Iterator[None]:
    """Modules of the package that are imported in here come without its __init__, which runs at the end."""
    # Imports make 400,000 objects that stay. To look for garbage among them time and again is a fifth of a start.
    gc.disable()
    try:
        yield
        package = sys.modules[PACKAGE]
        if not hasattr(package, "__version__"):
            package.__spec__.loader.exec_module(package)
            gc.freeze()  # nor later; and processes that are forked for reading go on sharing their memory
    finally:
        gc.enable()


if PACKAGE not in sys.modules:  # lets its modules be imported without its __init__
    _spec = importlib.util.find_spec(PACKAGE)
    if _spec is None:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed here: pip install -e .", name=PACKAGE)
    sys.modules[PACKAGE] = importlib.util.module_from_spec(_spec)

from startup.status import run_command_line  # noqa: E402, F401
