"""The public names are exactly the declared ones."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest
import typer
from torch import nn

import everystep
from everystep import cli, errors

ROOT = Path(__file__).parent.parent
MODULES = [
    module.name for module in pkgutil.walk_packages(everystep.__path__, "everystep.") if not module.ispkg
]


def test_everything_that_is_exported_is_there():
    assert all(getattr(everystep, name) is not None for name in everystep.__all__)
    assert sorted(everystep.__all__) == everystep.__all__
    assert {*dir(everystep)} - {"lightning", "numerics", "transformers"} == {*everystep.__all__}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = everystep.nonsense


@cache
def sources():
    """Return the classes of each source file, and what it imports: modules, and names of them."""
    found = {}
    for path in (ROOT / "src" / "everystep").rglob("*.py"):
        classes, imported = [], []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes.append(node.name)
            elif isinstance(node, ast.ImportFrom):
                imported.append((node.module, [alias.name for alias in node.names]))
            elif isinstance(node, ast.Import):
                imported += [(alias.name, []) for alias in node.names]
        found[path] = classes, imported
    return found


@cache
def imported_from():
    """Return the names that the source code imports, by module."""
    found = defaultdict(set)
    for _, imported in sources().values():
        for module, names in imported:
            found[module].update(names)
    return found


def test_all_lists_what_a_module_defines_for_others():
    for name in MODULES:
        module = importlib.import_module(name)
        defined = {
            key
            for key, value in vars(module).items()
            if not key.startswith("_")
            and (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == name
        }
        missing = [key for key in module.__all__ if not hasattr(module, key)]
        assert not missing, name
        # Within a module the helpers of a class may be public names too; what others import is listed.
        assert imported_from()[name] & defined <= set(module.__all__), name


def test_no_two_classes_and_no_two_modules_share_a_name():
    """A folder is a module; only `__init__` and `__main__` are in each."""
    classes, modules = Counter(), Counter()
    for path, (own, _) in sources().items():
        classes.update(own)
        modules[path.parent.name if path.stem == "__init__" else path.stem] += 1
    assert not [name for names in (classes, modules) for name, count in names.items() if count > 1]


def test_the_tree_of_exceptions_in_the_docstring_is_the_real_one():
    drawn = set(re.findall(r"\w+Error", errors.__doc__)) - {"ValueError", "IndexError"}
    assert drawn == {name for name in errors.__all__ if name.endswith("Error")}
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.DatasetChangedError, errors.TrainingError)
    own = {"EverystepError", "TrainingError", "DatasetChangedError", "RecordingError"}
    for name in drawn - own:
        assert issubclass(getattr(errors, name), errors.UsageError)


def test_the_reference_has_every_command_with_its_options_and_every_option_has_a_help():
    reference = (ROOT / "docs" / "reference.md").read_text()
    command = typer.main.get_command(cli.app)
    assert set(command.commands) == {
        "du", "rm", "prune",
        "train", "resume", "experiments", "runs", "losses", "table", "plot", "report",
        "step", "verify", "doctor", "diff", "rerun", "fork", "measure", "when", "why", "view",
        "rows", "what-if", "match", "first-nonfinite", "sweep",
    }  # fmt: skip
    for name, each in command.commands.items():
        own = [line for line in reference.splitlines() if f"everystep {name}" in line]
        assert own and each.help
        for option in each.params:
            names = [text for text in (*option.opts, *option.secondary_opts) if text.startswith("-")]
            # `--rank` is described once, for all commands that take it.
            is_known = not names or option.name in ("help", "rank")
            assert is_known or any(text in line for text in names for line in own), (name, names)
        assert all(parameter.help for parameter in each.params if parameter.name != "help")


def test_the_reference_describes_each_member_of_a_run_a_step_and_a_recording():
    reference = (ROOT / "docs" / "reference.md").read_text()
    run = everystep.train_experiment("two-layer", {"steps": 1}, progress=False)
    for thing in (run, run[1], everystep.record(model=nn.Linear(1, 1))):
        members = dir(thing)
        assert len(set(members)) == len(members) > 10
        for name in members:
            assert hasattr(type(thing), name) or name in vars(thing)
            assert re.search(rf"[`.]{name}\b", reference), name


def test_the_readme_is_short_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 900
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert len(links) > 6 and all((ROOT / link).is_file() for link in links)


def test_every_key_of_an_experiment_is_an_argument_of_train():
    from everystep.experiment.specification import Iteration

    arguments = inspect.signature(everystep.train).parameters
    assert set(Iteration.model_fields) <= set(arguments)
    documented = everystep.train.__doc__
    assert all(re.search(rf"\b{name}\b", documented) for name in arguments)


def test_nothing_reaches_for_the_network():
    clients = {"urllib.request", "http.client", "requests", "httpx", "aiohttp", "socket"}
    package = ROOT / "src" / "everystep"
    for path, (_, imported) in sources().items():
        names = {module for module, _ in imported}
        is_listening = path in (package / "page" / "server.py", package / "page" / "guard.py")
        assert not names & (clients - {"socket"} if is_listening else clients), path
    for path in (package / "page" / "static").rglob("*.*"):
        addresses = set(re.findall(r"https?://[^\s\"'`]+", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path


def test_the_page_makes_no_markup_of_texts():
    for path in (ROOT / "src" / "everystep" / "page" / "static").rglob("*.js"):
        assert not re.search(
            r"(inner|outer)HTML|insertAdjacent|document\.write|eval\(", path.read_text()
        ), path
