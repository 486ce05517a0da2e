#!/usr/bin/env python3
"""Measure how much code each package holds and how dense it is.

    python .ci/density.py [FOLDER]   print the tables of the package, or of the one in FOLDER
    python .ci/density.py --check    exit with 1 when a package or a folder of tests exceeds a limit

A token is a name, a number, a string or an operator. Docstrings and comments are not counted. A code line is a line
that holds a token. Limits per package of more than 300 code lines: 9 tokens per code line, 30 comprehensions and
20 conditional expressions per 1 000 code lines. Limits everywhere: 60 lines per function (90 for `train`), 400 per file.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

COUNTED = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

SMALL_PACKAGE = 300  # code lines up to which a package may be as dense as it likes
MAX_TOKENS_PER_LINE = 9.0
MAX_COMPREHENSIONS = 30  # per 1 000 code lines
MAX_CONDITIONALS = 20  # per 1 000 code lines
MAX_FUNCTION_LINES = 60
MAX_TRAIN_LINES = 90
MAX_FILE_LINES = 400

# Tokens that a group of packages may hold, and its packages
BUDGETS = {
    "compute node": (56_000, ("config.py", "schema.py", "records.py", "errors.py", "trial", "ijepa", "data", "training", "launch/worker")),
    "login node": (32_000, ("sweep", "launch/cluster", "launch/scheduler", "launch/submit", "launch/ops")),
    "results, tracking, report": (27_000, ("results", "labels.py", "tracking", "report")),
    "command line": (13_000, ("cli", "__main__.py")),
}


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def long_functions(path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield file, line and name of each function that is too long."""
    for node in ast.walk(tree):
        if not isinstance(node, FUNCTIONS):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        limit = MAX_TRAIN_LINES if node.name == "train" else MAX_FUNCTION_LINES
        if length > limit:
            yield f"{path}:{node.lineno}: {node.name} has {length} lines, more than {limit}"


def count_file(source: str, tree: ast.Module) -> Counter[str]:
    """Return the numbers of one file: lines, tokens, comprehensions, conditionals, Any."""
    skipped = docstring_lines(tree)
    code_lines: set[int] = set()
    count: Counter[str] = Counter(files=1)

    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in COUNTED and token.start[0] not in skipped:
            count["tokens"] += 1
            count["any"] += token.string == "Any"
            code_lines.update(range(token.start[0], token.end[0] + 1))
    count["lines"] = len(code_lines - skipped)

    for node in ast.walk(tree):
        count["comprehensions"] += isinstance(node, COMPREHENSIONS)
        count["conditionals"] += isinstance(node, ast.IfExp)
    return count


def package_of(path: Path, root: Path) -> str:
    """Return the package that a file counts for; the parts of launch/ count apart."""
    parts = path.relative_to(root).parts
    if parts[0] == "launch" and len(parts) > 2:
        return "/".join(parts[:2])
    return parts[0]


def exceeded(name: str, count: Counter[str]) -> Iterator[str]:
    """Yield one line for each limit that a package exceeds."""
    if count["lines"] <= SMALL_PACKAGE:
        return
    limits = (
        ("tokens per code line", count["tokens"] / count["lines"], MAX_TOKENS_PER_LINE),
        ("comprehensions per 1 000 lines", 1000 * count["comprehensions"] / count["lines"], MAX_COMPREHENSIONS),
        ("conditional expressions per 1 000 lines", 1000 * count["conditionals"] / count["lines"], MAX_CONDITIONALS),
    )
    for what, value, limit in limits:
        if round(value, 1) > limit:
            yield f"{name}: {value:.1f} {what}, more than {limit:g}"


def imported_modules(path: Path, tree: ast.Module, root: Path) -> set[str]:
    """Return the modules of the package that a file imports, also inside functions."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in modules if name.startswith(root.name + ".")}


def internal_imports(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports among these modules only."""
    return {name: (targets & imports.keys()) - {name} for name, targets in imports.items()}


def import_levels(imports: dict[str, set[str]]) -> int:
    """Return the number of import levels: a module lies one level above the highest that it imports."""
    remaining = internal_imports(imports)
    levels = 0
    while remaining:
        lowest = [name for name, targets in remaining.items() if not targets & remaining.keys()]
        for name in lowest or list(remaining):
            del remaining[name]
        levels += 1
    return levels


def on_circle(imports: dict[str, set[str]]) -> list[str]:
    """Return the modules that import themselves through others."""
    edges = internal_imports(imports)
    found: list[str] = []
    for name in edges:
        reached: set[str] = set()
        pending = list(edges[name])
        while pending:
            module = pending.pop()
            if module not in reached:
                reached.add(module)
                pending += edges[module]
        if name in reached:
            found.append(name)
    return found


def print_table(packages: dict[str, Counter[str]], lengths: list[int]) -> None:
    """Print the numbers of each package, then the tokens of each group of packages and its budget."""
    print(f"{'package':20} files  lines  tokens tok/line compr/k cond/k   Any")
    total = sum(packages.values(), Counter[str]())
    for name, count in [*packages.items(), ("all", total)]:
        lines = max(1, count["lines"])
        print(
            f"{name:20} {count['files']:5} {count['lines']:6} {count['tokens']:7}"
            f" {count['tokens'] / lines:8.1f}"
            f" {1000 * count['comprehensions'] / lines:7.0f}"
            f" {1000 * count['conditionals'] / lines:6.0f}"
            f" {count['any']:5}"
        )
    print(f"median file {median(lengths):g} lines, longest {max(lengths)}")
    for group, (budget, members) in BUDGETS.items():
        tokens = sum(count["tokens"] for name, count in packages.items() if name in members)
        print(f"{group:38} {tokens:7} tokens, budget {budget}")


class Measured:
    """The counts of all files below a folder, by package, and what exceeds a limit of its own."""

    def __init__(self, root: Path) -> None:
        self.packages: dict[str, Counter[str]] = defaultdict(Counter)
        self.lengths: list[int] = []
        self.long_functions: list[str] = []
        self.long_files: list[str] = []
        self.imports: dict[str, set[str]] = {}
        for path in sorted(root.rglob("*.py")):
            self._add(path, root)

    def _add(self, path: Path, root: Path) -> None:
        source = path.read_text()
        tree = ast.parse(source)
        shown = path.relative_to(root.parent)
        self.packages[package_of(path, root)] += count_file(source, tree)
        lines = len(source.splitlines())
        self.lengths.append(lines)
        if lines > MAX_FILE_LINES:
            self.long_files.append(f"{shown}: {lines} lines, more than {MAX_FILE_LINES}")
        self.long_functions += long_functions(shown, tree)
        module = ".".join(shown.with_suffix("").parts).removesuffix(".__init__")
        self.imports[module] = imported_modules(path, tree, root)

    def problems(self) -> list[str]:
        found = [*self.long_functions, *self.long_files]
        for name, count in self.packages.items():
            found += exceeded(name, count)
        circles = on_circle(self.imports)
        return found + [f"{name} imports itself through other modules" for name in circles]


def main() -> int:
    here = Path(__file__).parents[1]
    if "--check" in sys.argv:
        problems = Measured(here / "jepa_cluster").problems()
        for name in sorted(path.name for path in (here / "tests").iterdir() if path.is_dir()):
            tests = Measured(here / "tests" / name)
            total = sum(tests.packages.values(), Counter[str]())
            problems += [*tests.long_functions, *tests.long_files]
            problems += exceeded(f"tests/{name}", total)
        print("\n".join(problems) or "size and density are within the limits")
        return 1 if problems else 0

    measured = Measured(Path(sys.argv[1]) if sys.argv[1:] else here / "jepa_cluster")
    print_table(measured.packages, measured.lengths)
    launch = {name: imports for name, imports in measured.imports.items() if ".launch" in name}
    print(f"functions over {MAX_FUNCTION_LINES} lines: {len(measured.long_functions)}")
    print(f"import levels of launch/: {import_levels(launch)}")
    print(f"modules on a circle of imports: {', '.join(on_circle(measured.imports)) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
