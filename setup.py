"""Builds the native modules of kvcache; everything else is said in pyproject.toml.

KVCACHE_TRACE=1 builds with line tracing, for coverage; KVCACHE_SANITIZE=1 with AddressSanitizer and UBSan.
"""

import os
from pathlib import Path

import Cython
from Cython.Build import cythonize
from setuptools import Extension, setup

TRACE = os.environ.get("KVCACHE_TRACE") == "1"
SANITIZE = os.environ.get("KVCACHE_SANITIZE") == "1"

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "embedsignature": False,
    "auto_pickle": False,
    "freethreading_compatible": True,
    "linetrace": TRACE,
}

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZE else []
CFLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", *SANITIZERS] if SANITIZE else ["-O1" if TRACE else "-O3"]
MACROS = [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1")] if TRACE else []

STAMP = Path("build/settings")  # what the C files lying here were made with: their dates do not tell


def extensions():
    return [
        Extension(
            f"kvcache.{path.stem}",
            [str(path)],
            include_dirs=["kvcache"],
            depends=[str(header) for header in sorted(Path("kvcache").glob("*.h"))],
            extra_compile_args=CFLAGS,
            extra_link_args=SANITIZERS,
            define_macros=MACROS,
        )
        for path in sorted(Path("kvcache").glob("*.pyx"))
    ]


def cythonized():
    """The extensions with their C files, made anew where directives, flags or Cython have changed."""
    settings = repr((DIRECTIVES, CFLAGS, MACROS, Cython.__version__))
    changed = not STAMP.exists() or STAMP.read_text() != settings
    modules = cythonize(extensions(), compiler_directives=DIRECTIVES, force=changed)
    STAMP.parent.mkdir(exist_ok=True)
    STAMP.write_text(settings)
    return modules


if __name__ == "__main__":
    setup(ext_modules=cythonized(), options={"build_ext": {"parallel": os.cpu_count()}})
