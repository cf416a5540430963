import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import cppo_trl

ROOT = Path(__file__).parent.parent


def python(*arguments, cwd):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)


def test_wheel_installs_and_imports(tmp_path):
    built = python("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"cppo_trl/py.typed", "cppo_trl/report/page.html"} <= set(names)
    assert {"cppo_trl/recipes/qwen3-1.7b/one-gpu/cppo.yaml", "cppo_trl/recipes/accelerate/fsdp2.yaml"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("cppo_trl/", "cppo_trl-")) for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (scripts,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "cppo-trl = cppo_trl.launch.command:main" in scripts.read_text()
    for path in (tmp_path / "site/cppo_trl").rglob("*.yaml"):  # what only a clone has is not named
        assert not [word for word in ("scripts/", "configs/", "docs/", "README", "make ") if word in path.read_text()]
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import cppo_trl; "
        "assert 'torch' not in sys.modules; "  # the rewards' workers rely on it
        "from cppo_trl import CPPOConfig, CPPOTrainer; "
        "import cppo_trl.launch.training, cppo_trl.rewards, cppo_trl.report; "
        "print(cppo_trl.__file__, CPPOTrainer._name)"
    )
    imported = python("-c", program, cwd=tmp_path)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.split() == [str(tmp_path / "site/cppo_trl/__init__.py"), "CPPO"]


def test_the_version_is_that_of_the_package_everywhere():
    assert version("cppo-trl") == cppo_trl.__version__
    assert f"\nversion: {cppo_trl.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_unknown_names_are_attribute_errors():
    failed = python("-c", "import cppo_trl; cppo_trl.CPPOTrainr", cwd=ROOT)
    assert "has no attribute 'CPPOTrainr'" in failed.stderr


def test_every_direct_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {"yaml" if name == "pyyaml" else name for name in map(first_word, project["dependencies"])}
    extras = {"plots": "matplotlib", "report": "jinja2 matplotlib", "vllm": "vllm"}
    for extra, names in extras.items():
        assert set(names.split()) <= set(map(first_word, project["optional-dependencies"][extra]))
        declared |= set(names.split())
    imported = set()
    for path in (ROOT / "cppo_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"cppo_trl"} <= declared


def first_word(requirement):
    """The name of a requirement."""
    return requirement.replace(">", " ").replace("[", " ").split()[0]
