import subprocess
import sys
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
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("cppo_trl/", "cppo_trl-")) for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
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
