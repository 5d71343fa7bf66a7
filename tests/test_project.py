"""What holds for the project as a whole: one version, plain names, nothing of the machine it was made on."""

import ast
import importlib.metadata
import re
from importlib.resources import files
from pathlib import Path

import pytest

import kvcache

ROOT = Path(__file__).parents[1]
PLACES = ("kvcache", "tests", "bench", "docs", ".ci")
TEXT = {".py", ".pyx", ".pxd", ".pyi", ".h", ".md", ".toml", ".in", ".json", ".css", ".html", ""}
BUILT = {"_build", "__pycache__", "build", "dist"}

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "misc"}
OF_A_MACHINE = re.compile(r"(?<![\w.~])/(?:work|root|home|opt|Users)/\w+|\.\./shared/\w+\.md")


def sources():
    """Every text file of the project, whether it lies in a checkout or in an unpacked sdist."""
    found = [path for path in ROOT.iterdir() if path.suffix in TEXT and not path.name.startswith(".")]
    for place in PLACES:
        found += (ROOT / place).rglob("*")
    return sorted(
        path
        for path in found
        if path.is_file()
        and path.suffix in TEXT
        and path.name != "PKG-INFO"
        and not BUILT & set(path.relative_to(ROOT).parts)
    )


def named(path):
    return str(path.relative_to(ROOT))


def test_the_version_is_stated_in_one_place():
    statement = re.compile(r"(?<![\d.])" + re.escape(kvcache.__version__) + r"(?![\d.])")
    stating = [named(path) for path in sources() if statement.search(path.read_text())]
    assert [name for name in stating if name != "CHANGELOG.md"] == ["kvcache/_version.py"]


def test_the_changelog_has_an_entry_for_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{kvcache.__version__}]" in changelog or "## [Unreleased]" in changelog


def test_the_installed_version_is_the_one_of_the_sources():
    try:
        installed = importlib.metadata.version("kvcache")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, only built in place")
    assert installed == kvcache.__version__


def test_no_module_is_named_for_being_a_heap():
    assert [named(path) for path in sources() if path.stem in FORBIDDEN_NAMES] == []


def test_no_file_names_a_place_on_the_machine_it_was_written_on():
    lines = [
        f"{named(path)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if OF_A_MACHINE.search(line)
    ]
    assert lines == []


@pytest.mark.parametrize(
    "line", ["cd /" + "root/kvcache", "see ../" + "shared/notes.md", 'open("/' + 'opt/x")']
)
def test_a_place_on_a_machine_is_recognised(line):
    assert OF_A_MACHINE.search(line)


def test_the_package_validates_without_assert():
    asserting = [
        f"{named(path)}:{node.lineno}"
        for path in (ROOT / "kvcache").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    asserting += [
        f"{named(path)}: {line}" for path in (ROOT / "kvcache").glob("*.pyx")
        for line in re.findall(r"^\s*assert .*", path.read_text(), re.MULTILINE)
    ]  # fmt: skip
    assert asserting == []


def test_what_native_engines_and_type_checkers_need_is_installed():
    installed = {path.name for path in files("kvcache").iterdir()}
    shipped = [path.name for kind in ("pxd", "h", "pyi") for path in (ROOT / "kvcache").glob(f"*.{kind}")]
    assert {"py.typed", "_alloc.pxd", "_alloc.pyi", *shipped} <= installed
