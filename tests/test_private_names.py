"""Names of SAELens and PyTorch that are not public stand in one module, and are checked there."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import saelens_sparse
from saelens_sparse import private_names
from saelens_sparse.private_names import require

PACKAGE = Path(saelens_sparse.__file__).parent
LISTED = {
    name
    for value in vars(private_names).values()
    if isinstance(value, tuple)
    for name in value
    if isinstance(name, str)
}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_(?!_)\w+", name) is not None


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a module gives a meaning to, in whatever scope."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def used_of_others(tree: ast.AST) -> Iterator[str]:
    """The private names that a module imports from elsewhere or reads of some object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(PACKAGE.name):
            yield from (alias.name for alias in node.names if is_private(alias.name))


def test_no_other_private_name_is_used() -> None:
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    own = {name for tree in trees.values() for name in defined(tree)}
    # Named tuples' and PyTorch's C module are documented, and named like this only.
    documented = {"_C", "_replace", "_asdict"}
    for path, tree in trees.items():
        foreign = set(used_of_others(tree)) - own - LISTED - documented
        assert not foreign, f"{path.name} uses {foreign}: list them in private_names.py"


def test_every_listed_name_is_used() -> None:
    text = "".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name != "private_names.py")
    groups = {"MODULE_HOOKS", "TENSOR_HOOKS", "OPTIMIZER_HOOKS", "parse_cfg_args"}
    assert all(group in text for group in groups)
    for name in (
        *private_names.TRAINERS,
        *private_names.STORE,
        *private_names.MULTI_RUNNER,
        *private_names.TENSOR,
        *private_names.FUNCTIONAL_ADAM,
    ):
        assert name in text


def test_a_missing_name_is_said_with_the_releases_that_have_it() -> None:
    with pytest.raises(
        ImportError, match=r"needs Runner\._gone, which sae-lens [\d.]+ does not have.*6\.54\.12"
    ):
        require("sae-lens", "Runner", ["_there", "_gone"], ["_there"])


def test_importing_the_package_checks_them() -> None:
    """In a process of its own, where SAELens has lost one."""
    code = (
        "from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner\n"
        "del MultiSAETrainingRunner._save_final_outputs\n"
        "import saelens_sparse\n"
    )
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert (
        process.stderr.strip()
        .splitlines()[-1]
        .startswith("ImportError: saelens_sparse needs MultiSAETrainingRunner._save_final_outputs")
    )
