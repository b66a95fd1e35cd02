"""What a plain `pip install .` brings: everything that `mslt` looks up by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_recipes_and_engine_configs_come_along(tmp_path: Path) -> None:
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    wanted = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=wanted)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*install, str(site), str(checkout)], check=True, capture_output=True)
    shutil.rmtree(checkout)

    (tmp_path / "elsewhere").mkdir()
    recipes = sorted((ROOT / "launch" / "recipes").glob("[!d]*.yaml"))
    assert {"bert-base", "bert-large", "bert-base-full", "quickstart"} <= {path.stem for path in recipes}
    for recipe in recipes:
        done = subprocess.run(
            [sys.executable, "-m", "mslt.cli.main", "plan", recipe.stem],
            env={**os.environ, "PYTHONPATH": str(site)},
            cwd=tmp_path / "elsewhere",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert recipe.stem in done.stdout
    assert (site / "mslt" / "recipes" / "data-quickstart.yaml").is_file()
    assert (site / "data_prep" / "prepare.py").is_file()
    assert not (site / "tests").exists()
