"""Folders named like other people's modules, the package made of them, its console command, and what installs it.

`ssl/` and `datasets/` lie at the top of the repository under the names of a standard-library module and of a well-known
package. That is harmless only while the rules checked here hold.
"""

import importlib
import importlib.metadata
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import helpers
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("datasets", "ssl", "eval", "configs")
PARTS = ("common", "datasets", "ssl", "eval")  # those with code
# Used where installed: every module of the package must import without them, and their names must stay free.
OPTIONAL_MODULES = {
    "datasets", "faiss", "h5py", "mlflow", "onnx", "onnxruntime", "onnxscript", "pyarrow", "timm", "trackio",
    "transformers", "wandb", "xformers",
}  # fmt: skip


def place(folder: str) -> Path:
    """`common/` is in the package itself; the others lie at the top, with links to them in it."""
    return ROOT / "src/skipless/common" if folder == "common" else ROOT / folder


def python_files(folder: str) -> list[Path]:
    """All Python files of a part of the package, sorted."""
    return sorted(place(folder).rglob("*.py"))


def module_name(file: Path) -> str:
    """`ssl/model/vit.py` -> `skipless.ssl.model.vit`."""
    start = ROOT / "src/skipless" if file.is_relative_to(ROOT / "src/skipless") else ROOT
    return ".".join(("skipless", *file.relative_to(start).with_suffix("").parts))


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(*extras: str) -> dict[NormalizedName, Requirement]:
    """The requirements in pyproject.toml by normalized name: the mandatory ones and those of `extras`."""
    project = pyproject()["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_package_folder_is_a_relative_symlink_to_the_real_one(folder: str) -> None:
    link = ROOT / "src/skipless" / folder
    assert link.is_symlink(), f"{link} is no symlink: clone again with `git -c core.symlinks=true clone`"
    assert os.readlink(link) == f"../../{folder}"
    assert link.resolve() == ROOT / folder
    assert (ROOT / folder).is_dir()


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_init_file_makes_a_regular_package_of_a_top_level_folder(folder: str) -> None:
    # With one, `import ssl` started from the repository would find this folder and not the standard library.
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", [*FOLDERS, "benchmarks", "examples"])
def test_no_file_or_folder_is_named_like_another_module(folder: str) -> None:
    # `python ssl/pretrain.py` puts ssl/ first on the path: ssl/logging.py would replace the standard library's.
    names = {path.stem for path in (ROOT / folder).glob("*.py")}
    names |= {path.name for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"}
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions()) | OPTIONAL_MODULES
    assert names & taken == set()


@pytest.mark.parametrize("folder", [".", *FOLDERS])
def test_import_ssl_gives_the_standard_library(folder: str) -> None:
    # With -c the working directory is the first entry of sys.path, as a script's own folder is for a script.
    probe = "import sys, ssl, asyncio; ssl.create_default_context; print(sys.path[0], ssl.__file__, sep='|')"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    run = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT / folder, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"|{Path(os.__file__).with_name('ssl.py')}"


def test_package_imports_find_the_real_folders() -> None:
    for folder in FOLDERS:
        package = importlib.import_module(f"skipless.{folder}")
        assert [Path(entry).resolve() for entry in package.__path__] == [ROOT / folder]


def test_every_module_imports_from_anywhere_without_the_optional_packages(tmp_path: Path) -> None:
    names = [module_name(file) for folder in PARTS for file in python_files(folder)]
    done = helpers.run("import_everything", [",".join(names), ",".join(OPTIONAL_MODULES)], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_configs_are_reachable_as_package_data() -> None:
    packaged = {entry.name for entry in importlib.resources.files("skipless.configs").iterdir()}
    assert {file.name for file in (ROOT / "configs").glob("*.yaml")} <= packaged


def test_wheel_holds_every_source_file_and_recipe(tmp_path: Path) -> None:
    # Built from a copy: setuptools leaves build/ and an egg-info behind.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", *FOLDERS):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    expected = {"skipless/__init__.py", "skipless/__main__.py", "skipless/py.typed"}
    expected |= {f"skipless/common/{file.name}" for file in python_files("common")}
    for folder in FOLDERS:
        files = [*python_files(folder), *(ROOT / folder).rglob("*.yaml"), *(ROOT / folder).rglob("*.html")]
        files += (ROOT / folder).rglob("shipped/*.*")
        expected |= {f"skipless/{file.relative_to(ROOT).as_posix()}" for file in files}
    assert {name for name in held if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in held)
    (scripts,) = (name for name in held if name.endswith("entry_points.txt"))
    assert "skipless = skipless.__main__:main" in zipfile.ZipFile(wheel).read(scripts).decode()


def skipless(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "skipless", *words], capture_output=True, text=True, check=False)


def test_console_command_lists_every_command_without_importing_anything_else() -> None:
    probe = "import sys, skipless.__main__ as m; m.main([]); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    *table, loaded = done.stdout.splitlines()
    assert {name.partition(".")[0] for name in loaded.split()} & {"torch", "numpy", "cv2", "jsonargparse"} == set()
    listed = {line.split()[0]: line for line in table if line.startswith("  ")}
    tops = [file for folder in ("datasets", "ssl", "eval") for file in (ROOT / folder).glob("*.py")]
    files = {file.stem.replace("_", "-") for file in tops if file.read_text().endswith("\n    main()\n")}
    assert set(listed) == files
    for line in listed.values():
        assert re.search(r"  \S[^.]*\.$", line), line


def test_console_command_runs_a_command_under_its_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("skipless.__main__").main(["scenes", "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: skipless scenes ")


def test_console_command_refuses_an_unknown_name() -> None:
    done = skipless("kn", "--ckpt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no command kn: did you mean knn? skipless --help lists them\n"
    assert skipless("attention_maps").stderr.startswith("error: --ckpt and --images are missing")
    assert skipless("zzzzzz").stderr == "error: there is no command zzzzzz: skipless --help lists them\n"


COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("datasets", "ssl", "eval", "benchmarks", "experiments", "examples")
    for path in (ROOT / folder).glob("*.py")
    if path.read_text().endswith("\n    main()\n")
)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_of_every_command(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    inside = script.split("/")[0] in FOLDERS
    name = "skipless." + script.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name) if inside else helpers.load(ROOT / script)
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {script} ")
    assert module.__doc__.splitlines()[0] in printed


def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows() -> None:
    pins: dict[NormalizedName, Version] = {}
    for line in constraint_lines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
        assert match, f"constraints.txt: '{line}' is not NAME==VERSION (without hash, URL or local label)"
        name = canonicalize_name(match[1])
        assert name not in pins, f"constraints.txt pins {name} twice"
        pins[name] = Version(match[2])
    for name, requirement in requirements(*pyproject()["project"]["optional-dependencies"]).items():
        assert name in pins, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is pinned, {requirement} is asked for"
    # Each torch release asks for its own CUDA libraries: a second opinion here could only disagree.
    # xformers does not ask for the one that its wheels need.
    assert [name for name in pins if name.startswith(("nvidia-", "cuda-"))] == ["nvidia-cuda-runtime-cu12"]


def test_gpu_and_cpu_extras_exclude_each_other() -> None:
    # Both distributions install the folder `faiss`; whichever came last would win.
    gpu, cpu = (set(requirements(extra)) - set(requirements()) for extra in ("gpu", "cpu"))
    assert gpu == {"faiss-gpu", "nvidia-cuda-runtime-cu12", "xformers"}
    assert cpu == {"faiss-cpu"}


CONDA_NAMES = {"torch": "pytorch", "opencv-python-headless": "opencv"}


def test_conda_environment_has_every_requirement_of_the_gpu_extra() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = pyproject()["project"]
    assert environment["name"] == project["name"]
    assert environment["channels"] == ["conda-forge"]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    conda = {entry for entry in environment["dependencies"] if isinstance(entry, str)}
    (python,) = (entry for entry in conda if entry.startswith("python="))
    assert SpecifierSet(project["requires-python"]).contains(python.removeprefix("python="))
    listed = {*(conda - {python, "pip"}), *pip} - {"-e ."}
    expected = {str(requirement) for requirement in requirements("gpu").values()}
    expected -= {line for line in expected if line.startswith("nvidia-")}  # conda-forge's xformers brings its own
    for name, conda_name in CONDA_NAMES.items():
        expected = {line.replace(name, conda_name) if line.startswith(f"{name}>") else line for line in expected}
    assert listed == expected
    assert pip[-1] == "-e ."


def test_gpu_extra_reaches_the_packages_that_the_project_promises() -> None:
    promised = {"torch", "torchvision", "xformers", "scikit-learn", "pycocotools", "faiss-gpu"}
    assert promised | {"opencv-python-headless"} <= set(requirements("gpu"))


STAND_IN = """#!/bin/sh
echo "$0 $*" >> "$LOG"
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    -V) echo "Python 3.9.1" ;;
    -c*) exit {old} ;;
esac
"""

# The suite itself may have been started by make, with choices on its command line.
MAKE_VARIABLES = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "EXTRA", "PY", "PYTHON")


class Project:
    """A copy of the Makefile and its inputs; `make(...)` runs it and `calls` lists what it asked of Python."""

    def __init__(self, folder: Path, python_is_old: bool = False, gpu: bool = False) -> None:
        self.folder, self.log = folder, folder / "log"
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        tools = folder / "tools"
        tools.mkdir()
        for name, script in {
            "python3": STAND_IN.format(old=int(python_is_old)),
            "nvidia-smi": f"#!/bin/sh\nexit {int(not gpu)}\n",
        }.items():
            (tools / name).write_text(script)
            (tools / name).chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES}
        self.environment |= {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "LOG": str(self.log)}

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        return subprocess.run(
            ["make", *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize(("gpu", "extra"), [(False, "cpu"), (True, "gpu")])
def test_make_installs_in_one_pip_command_with_the_extra_of_the_machine(tmp_path: Path, gpu: bool, extra: str) -> None:
    project = Project(tmp_path, gpu=gpu)
    run = project.make("test")
    assert run.returncode == 0, run.stderr
    installs = [call for call in project.calls if " install " in call]
    assert len(installs) == 1
    assert installs[0].startswith(".venv/bin/python -m pip install ")
    assert installs[0].endswith(f" -c constraints.txt -e .[{extra},dev]")
    assert " -m pytest" in project.calls[-1]


@needs_make
def test_make_installs_again_only_when_the_dependencies_change(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.make("test")
    project.make("demo")
    assert project.calls == [".venv/bin/python examples/demo.py"]
    inputs = ("constraints.txt", "pyproject.toml")
    for changed in inputs:
        for name in (*inputs, ".venv/.stamp"):
            os.utime(tmp_path / name, (1, 1))
        os.utime(tmp_path / changed, (2, 2))
        project.make("demo")
        assert any(" install " in call for call in project.calls), changed


@needs_make
def test_make_uses_an_environment_of_the_users_own(tmp_path: Path) -> None:
    project = Project(tmp_path)
    assert project.make("demo", "PY=python3").returncode == 0
    assert [call.removeprefix(f"{tmp_path}/tools/") for call in project.calls] == ["python3 examples/demo.py"]
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_make_refuses_an_old_python_in_one_sentence(tmp_path: Path) -> None:
    project = Project(tmp_path, python_is_old=True)
    run = project.make("test")
    assert run.returncode != 0
    assert run.stderr.startswith("skipless needs Python 3.11 or newer, but 'python3' is Python 3.9.1:")
    assert not (tmp_path / ".venv").exists()


def test_no_text_file_names_a_folder_of_one_machine() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: no list of the project's files")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    absolute = re.compile(r"(?<![\w.~/})>\]-])/(?:home|Users|root|tmp|var/tmp|work)/[\w.]+")
    found = []
    for name in listing.stdout.decode().split("\0"):
        file = ROOT / name
        if not name or file.is_symlink() or not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {match[0]}" for match in absolute.finditer(text)]
    assert found == []
