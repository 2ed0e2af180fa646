"""The import rules that keep data flowing one way, and file sizes that keep a file readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"kernels", "diffult", "ffcv_writers", "bench"}
VERBS = {
    "run", "pack", "train_extractor", "train_diffusion", "generate", "train_classifier", "evaluate", "report",
    "compare", "predict", "doctor",
}  # fmt: skip
NOUNS = ("data", "models", "diffusion", "longtail", "generation", "planning", "reporting", "engine")
RUN = ("diffult.runs.run_dir", "diffult.runs.stages")  # runs.files, which writes whole files, serves everyone


def imports(file: Path) -> set[str]:
    """Dotted names of all modules of ours that a file imports, anywhere in it."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (prefix, node.module) if part)
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] in OURS}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("package", ["kernels", "ffcv_writers"])
def test_libraries_import_nothing_of_ours(package):
    for file in files(package):
        assert {name.split(".")[0] for name in imports(file)} <= {package}, file


def modules(*packages: str) -> dict[str, set[str]]:
    """What each module imports of ours."""
    graph = {}
    for package in packages:
        for file in files(package):
            parts = file.relative_to(ROOT).with_suffix("").parts
            graph[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = imports(file)
    return graph


def test_the_verbs_are_the_modules_with_a_command():
    assert {file.stem for file in (ROOT / "diffult").glob("*.py") if "def command(" in file.read_text()} == VERBS


def test_nouns_import_neither_a_verb_nor_a_run():
    above = {f"diffult.{verb}" for verb in (*VERBS, "rehearse")} | {*RUN, "diffult.cli"}
    for noun in NOUNS:
        for file in files(f"diffult/{noun}"):
            assert not imports(file) & above, file


def test_the_configuration_imports_nothing_that_imports_it():
    graph = modules("diffult")
    seen: set[str] = set()
    waiting = {"diffult.config"}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= {target for target in graph.get(name, set()) if target in graph} - seen
    assert not [name for name in seen - {"diffult.config"} if "diffult.config" in graph[name]]


def test_verbs_import_each_other_only_in_run_and_compare():
    verbs = {f"diffult.{verb}" for verb in VERBS}
    for verb in VERBS - {"run", "compare"}:
        assert not imports(ROOT / "diffult" / f"{verb}.py") & verbs, verb


def test_only_run_imports_what_rehearses_the_verbs():
    for name, imported in modules("diffult").items():
        assert name == "diffult.run" or "diffult.rehearse" not in imported, name


def test_no_circular_imports():
    graph = modules("kernels", "ffcv_writers", "diffult")
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if state.get(name) == 2 or name not in graph:
            return
        assert state.get(name) != 1, " -> ".join((*path, name))
        state[name] = 1
        for target in graph[name]:
            if not name.startswith(target + ".") and target != name:  # a package's face is no circle
                visit(target, (*path, name))
        state[name] = 2

    for name in graph:
        visit(name, ())


def test_files_are_short():
    for folder in OURS | {"tests"}:
        for file in files(folder):
            assert len(file.read_text().splitlines()) <= (420 if folder == "tests" else 400), file


def test_nothing_names_what_lies_outside_the_repository():
    """The product never reads a neighbour folder; tests may, and skip where it is absent."""
    for folder in OURS:
        for file in files(folder):
            assert "../shared" not in file.read_text() and "/shared/" not in file.read_text(), file


def test_our_kernels_package_does_not_disturb_the_hub_package_of_that_name():
    """transformers and diffusers look for a package `kernels`; importing them beside ours must work."""
    pytest.importorskip("diffusers", reason="the bench extra (diffusers) is not installed")
    code = "import kernels.random, diffusers; diffusers.UNet2DModel, diffusers.DDIMScheduler; print(kernels.__file__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert str(ROOT / "kernels") in out.stdout


def test_the_compiler_is_imported_only_where_something_is_compiled():
    """torch._dynamo is a third of a command's start."""
    verbs = [file.stem for file in (ROOT / "diffult").glob("*.py") if "main(command)" in file.read_text()]
    code = f"import sys; from diffult import {', '.join(verbs)}; sys.exit('torch._dynamo' in sys.modules)"
    assert len(verbs) > 9 and subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
