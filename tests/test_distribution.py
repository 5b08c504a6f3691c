"""The wheel and the source distribution: what is in them, and that they work in an environment of their own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
MODULES = {
    str(path.relative_to(ROOT))
    for package in ("segloss", "segattr")
    for path in (ROOT / package).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
# Beside the modules; .gitignore because it says what is left out.
SOURCE_FILES = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "PKG-INFO", ".gitignore"}

# What is not required of a user: the environment of the tests has it, and shows it to the new ones.
EXTRAS = (
    *(
        "torchvision",
        "matplotlib",
        "tqdm",
        "tyro",
        "PIL",
        "skimage",
        "sklearn",
        "tensorboard",
        "torchmetrics",
        "pandas",
    ),
    *("sphinx", "docutils", "pytest", "hypothesis", "build", "hatchling"),
)
WITHOUT_EXTRAS = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"  # None: cannot be imported

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    """What a command prints; it sees nothing of the checkout, and its warnings are errors."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The wheel, the source distribution from which it was built, and what building printed."""
    folder = tmp_path_factory.mktemp("built")
    output = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source, output


def test_building_warns_of_nothing(built: tuple[Path, Path, str]) -> None:
    assert "Successfully built" in built[2]
    assert not re.search("warn|deprecat", built[2], re.IGNORECASE), built[2]


def test_the_wheel_has_the_packages_and_the_licence_only(built: tuple[Path, Path, str]) -> None:
    assert built[0].name == f"segprims-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        metadata = wheel.read(f"segprims-{VERSION}.dist-info/METADATA").decode()
    assert {"segloss/py.typed", "segattr/py.typed"} <= MODULES
    information = {f"segprims-{VERSION}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD")}
    assert names == MODULES | information | {f"segprims-{VERSION}.dist-info/licenses/LICENSE"}
    required = [line.split()[1] for line in metadata.splitlines() if re.match("Requires-Dist: (?!.*extra ==)", line)]
    required = [re.split("[<>=;]", requirement)[0] for requirement in required]
    assert sorted(required) == ["numpy", "scipy", "torch", "triton"], "extras are not required"


def test_the_source_distribution_has_what_a_build_needs_only(built: tuple[Path, Path, str]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {member.name.removeprefix(f"segprims-{VERSION}/") for member in archive.getmembers() if member.isfile()}
    assert names == MODULES | SOURCE_FILES


@pytest.fixture(scope="module", params=["wheel", "source distribution"])
def python(
    request: pytest.FixtureRequest, built: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The interpreter of a new environment with one of them installed; what they require is that of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # The lines of a .pth file add folders, whose own .pth files, such as that of an editable install, do not count.
    Path(packages, "required.pth").write_text(sysconfig.get_path("purelib") + "\n")
    file = built[0] if request.param == "wheel" else built[1]
    # --ignore-installed: the editable install of this environment can be seen from the new one, and shall stay.
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--no-warn-script-location")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, file, cwd=folder)
    return python


def test_the_installed_packages_are_imported_and_know_their_version(python: Path, tmp_path: Path) -> None:
    code = WITHOUT_EXTRAS + (
        "import importlib.metadata, segattr.plot, segloss\n"
        "print(segloss.__file__, segattr.__file__, importlib.metadata.version('segprims'), sep='\\n')\n"
        "print(importlib.metadata.distribution('segprims').locate_file(''))"
    )
    lines = run(python, "-W", "error", "-c", code, cwd=tmp_path).splitlines()
    assert lines[2] == VERSION
    for place in (lines[0], lines[1], lines[3]):
        assert Path(place).is_relative_to(python.parents[1]), place


def test_types_of_the_installed_packages_are_those_of_a_typed_user(python: Path, tmp_path: Path) -> None:
    user = shutil.copy(ROOT / "tests" / "typed_user.py", tmp_path)  # away from the sources, which mypy would take
    options = ("--strict", "--cache-dir", ROOT / ".mypy_cache" / "installed")  # torch is read once for both
    output = run(sys.executable, "-m", "mypy", *options, "--python-executable", python, user, cwd=tmp_path)
    assert output == "Success: no issues found in 1 source file\n"


def test_the_first_example_of_the_readme_runs(python: Path, tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    code = WITHOUT_EXTRAS + block[1] + "assert loss.isfinite() and logits.grad.abs().sum() > 0\n"
    assert run(python, "-c", code, cwd=tmp_path) == ""


def test_the_quickstart_runs_from_outside_the_checkout(python: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    budget = ("--steps", 2, "--pretrain-steps", 1, "--scenes", 16, "--size", 32, "--device", "cpu")
    output = run(python, tmp_path / "examples" / "quickstart.py", *budget, cwd=tmp_path)
    assert "size targets" in output
    assert (tmp_path / "runs" / "quickstart" / "quickstart.png").exists()


def test_citation_and_changelog_are_of_this_version_and_of_one_day() -> None:
    citation = re.findall(r"^(?:version|date-released): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    unreleased, *released = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert unreleased == "[Unreleased]"
    assert citation[0] == VERSION
    assert released[0] == f"[{VERSION}] - {citation[1]}"
