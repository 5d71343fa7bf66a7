"""Compiles the Cython modules in tests/native against the package under test, as a native engine would."""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kvcache

NATIVE = Path(__file__).parent / "native"
DIRECTIVES = ["-X", "freethreading_compatible=True"]  # importing it must not bring the GIL back


def compiled(name, folder):
    """Compiles ``native/<name>.pyx`` in `folder`, an empty one, and imports it."""
    source = shutil.copy(NATIVE / f"{name}.pyx", folder)
    package = Path(kvcache.__file__).parent
    # Cython finds the package's .pxd files on the path, the compiler its headers beside them
    paths = {
        "PYTHONPATH": str(package.parent),
        "CFLAGS": f"{os.environ.get('CFLAGS', '')} -I{package}".strip(),
    }
    command = [
        sys.executable,
        "-m",
        "Cython.Build.Cythonize",
        "-3",
        "--inplace",
        "--quiet",
        *DIRECTIVES,
        str(source),
    ]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name}.pyx does not compile:\n{done.stdout}{done.stderr}")
    binary = Path(folder) / f"{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    spec = importlib.util.spec_from_file_location(name, binary)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
