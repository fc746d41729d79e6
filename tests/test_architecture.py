"""The architecture of fabrik_daemon.py, read from its syntax tree and its comments.

Each rule is a pure function from source text to violations, `line: message` each. The module must give none; a small
clean source must give none either; and a violation planted into that source, or into the module itself, must be caught
by exactly the rule that forbids it.

`python tests/test_architecture.py` writes all violations of the module, and the mean length of its functions.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple, Union

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
MODULE: Final = ROOT / "fabrik_daemon.py"

# What DESIGN.md says -------------------------------------------------------------------------------------------------

CORE_SECTIONS: Final = (
    "Limits",
    "Errors",
    "Vocabulary",
    "Text and time",
    "Settings",
    "Kubeconfig",
    "Projection",
    "Filters",
    "Store",
    "Bus",
    "History",
    "Schema",
    "Metrics",
    "HTTP",
    "Watch decoding",
    "Watch machine",
    "WebSocket",
    "Requests",
    "Shipping",
    "Views",
    "Demo script",
)
SHELL_SECTIONS: Final = (
    "Reactor",
    "Streams",
    "Cache",
    "Credentials",
    "Watcher",
    "Server",
    "Pusher",
    "Daemon",
    "Client",
    "Direct",
    "Diagnosis",
    "Dashboard",
    "Services",
    "Commands",
    "Command line",
)
ORDER: Final = CORE_SECTIONS + SHELL_SECTIONS
COMMANDS: Final = ("reading", "daemon and clusters", "installing")
TOP: Final = "Imports"

SECTION_LINES: Final = 450
CLASS_LINES: Final = 200
FUNCTION_LINES: Final = 50
FUNCTION_MEAN_LINES: Final = 15

# What makes a start cheap: lazy imports, and stand-ins for what typing would cost.
START_HELPERS: Final = {"_lazy", "_Lazy", "_ForCheckers", "_Fields", "late"}
START_NAMES: Final = {"TYPE_CHECKING = False", "Protocol = object", "_Made = TypeVar('_Made')"}

CLOCKS: Final = frozenset({"time", "monotonic", "perf_counter"})
CORE_MODULES: Final = (
    CLOCKS
    | {"socket", "ssl", "selectors", "sqlite3", "threading", "queue", "random", "os", "sys", "signal", "logging"}
    | {"zoneinfo", "importlib"}
)
CORE_FORBIDDEN: Final = CORE_MODULES | {"open", "print", "__import__"}
CLOCK_ATTRIBUTES: Final = frozenset({"now", "utcnow", "today"})

# Public in spite of the underscore: NamedTuple's methods and os._exit are documented.
PUBLIC_ATTRIBUTES: Final = frozenset({"_replace", "_asdict", "_make", "_fields", "_field_defaults", "_exit"})
FORBIDDEN_WORDS: Final = re.compile(r"(?<![a-z0-9])ssh(?![a-z0-9])|limactl|libvirt", re.IGNORECASE)

# Subscripts of these hold types, so a string inside is the name of a type. Python 3.9 needs such strings in aliases.
GENERICS: Final = (
    {"dict", "list", "tuple", "set", "frozenset", "type", "deque", "Union", "Optional", "Callable", "Mapping"}
    | {"MutableMapping", "Sequence", "MutableSequence", "Iterable", "Iterator", "Collection", "Generator", "Awaitable"}
    | {"Dict", "List", "Tuple", "Set", "FrozenSet", "Type", "Deque", "ClassVar", "Final", "Generic", "Protocol"}
    | {"ContextManager", "AbstractContextManager", "NamedTuple", "defaultdict"}
)

# Sections ------------------------------------------------------------------------------------------------------------

RULER: Final = re.compile(r"#\s*(-{5,}|={5,})\s*")
GOOD_RULER: Final = re.compile(r"# (-{70,}|={70,})")
TITLE: Final = re.compile(r"# \S.*")
HALF: Final = re.compile(r"(Core|Shell): \S.*")
BANNER_LINES: Final = 3

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS: Final = (*FUNCTIONS, ast.ClassDef)


class Banner(NamedTuple):
    """Three comment lines that introduce a section ('-') or a half ('=')."""

    line: int
    sign: str
    title: str


class Section(NamedTuple):
    """A run of lines under one banner; an empty name stands for what follows the banner of a half."""

    name: str
    first: int
    last: int
    half: str

    @property
    def parent(self) -> str:
        """Return the name in DESIGN.md's table: what stands before the colon."""
        return self.name.partition(": ")[0]

    @property
    def is_core(self) -> bool:
        """Tell whether the section belongs to the core, by its place or by its name."""
        return self.half == "Core" or self.parent in CORE_SECTIONS


class Module(NamedTuple):
    """A source, parsed: `sections` covers every line, `Imports` first; `malformed` are violations of the banners."""

    source: str
    tree: ast.Module
    sections: list[Section]
    halves: list[Banner]
    malformed: list[str]

    @property
    def named(self) -> list[Section]:
        """Return the sections that a banner introduces."""
        return [section for section in self.sections[1:] if section.name]

    @property
    def top(self) -> Section:
        """Return the pseudo section before the first banner."""
        return self.sections[0]

    def position(self, line: int) -> int:
        """Return which section a line stands in."""
        return max(0, bisect_right([section.first for section in self.sections], line) - 1)

    def section(self, line: int) -> Section:
        """Return the section a line stands in."""
        return self.sections[self.position(line)]


def comments_of(source: str) -> dict[int, str]:
    """Return line -> comment with what stands before it, so that only a comment alone at the margin begins with '#'."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.line.rstrip() for token in tokens if token.type == tokenize.COMMENT}


def banners_of(source: str) -> tuple[list[Banner], list[str]]:
    """Return the banners, and a violation for each ruler that is no part of one."""
    comments = comments_of(source)
    banners: list[Banner] = []
    malformed: list[str] = []
    done = 0
    for line in (line for line, text in sorted(comments.items()) if RULER.fullmatch(text.strip())):
        if line <= done:
            continue
        ruler, title, end = (comments.get(line + i, "") for i in range(BANNER_LINES))
        is_good = GOOD_RULER.fullmatch(ruler) and GOOD_RULER.fullmatch(end) and ruler[2] == end[2]
        if is_good and TITLE.fullmatch(title) and not RULER.fullmatch(title):
            banners.append(Banner(line, ruler[2], title[2:]))
            done = line + BANNER_LINES - 1
        else:
            malformed.append(f"{line}: a ruler outside a banner ('# ' and 70 signs, '# Name', the ruler again)")
    return banners, malformed


def trimmed(lines: list[str], first: int, last: int) -> int:
    """Return the last line, of those from first to last, that is not blank."""
    while last > first and not lines[last - 1].strip():
        last -= 1
    return last


@lru_cache(maxsize=8)
def parsed(source: str) -> Module:
    """Return the source with its syntax tree and its sections."""
    banners, malformed = banners_of(source)
    lines = source.splitlines()
    ends = [banner.line - 1 for banner in banners[1:]] + [len(lines)]
    sections = [Section(TOP, 1, banners[0].line - 1 if banners else len(lines), "")]
    half = ""
    for banner, end in zip(banners, ends):
        half = banner.title.partition(":")[0] if banner.sign == "=" else half
        name = banner.title if banner.sign == "-" else ""
        sections.append(Section(name, banner.line, trimmed(lines, banner.line, end), half))
    halves = [banner for banner in banners if banner.sign == "="]
    return Module(source, ast.parse(source), sections, halves, malformed)


# Names ---------------------------------------------------------------------------------------------------------------


class Use(NamedTuple):
    """A name that some line reads; `is_global` says that no function or class around it binds it."""

    name: str
    line: int
    is_global: bool


def is_private(name: str) -> bool:
    """Tell whether a name is private: one underscore or two before it, but not a dunder and not the lone '_'."""
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def bound_by(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each name that a node binds in its own scope, with its line, without looking into other scopes."""
    if isinstance(node, DEFINITIONS):
        yield node.name, node.lineno
        return
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, node.lineno
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name.partition(".")[0], node.lineno) for alias in node.names)
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name, node.lineno
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.comprehension) and child is node.target):
            yield from bound_by(child)


def locals_of(body: Iterable[ast.AST], arguments: ast.arguments | None = None) -> frozenset[str]:
    """Return the names that are local to a function or a class body."""
    body = list(body)
    names = {name for statement in body for name, _ in bound_by(statement)}
    if arguments:
        names |= {node.arg for node in ast.iter_child_nodes(arguments) if isinstance(node, ast.arg)}
    return frozenset(names - {name for node in body for name in declared_global(node)})


def declared_global(node: ast.AST) -> Iterator[str]:
    """Yield the names of the `global` statements in a scope."""
    if isinstance(node, ast.Global):
        yield from node.names
    elif not isinstance(node, (*DEFINITIONS, ast.Lambda)):
        for child in ast.iter_child_nodes(node):
            yield from declared_global(child)


def last_name(node: ast.AST | None) -> str:
    """Return `c` of `c` and of `a.b.c`, else nothing."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


class Uses(ast.NodeVisitor):
    """Collects the names that are read, also in annotations, string annotations and decorators."""

    def __init__(self) -> None:
        """Start at module level."""
        self.found: list[Use] = []
        self._scopes: list[tuple[bool, frozenset[str]]] = []  # is a class body, the names it binds
        self._in_type = False

    def _use(self, name: str, line: int) -> None:
        inner = self._scopes[-1:]
        visible = [names for is_class, names in self._scopes[:-1] if not is_class] + [names for _, names in inner]
        self.found.append(Use(name, line, not any(name in names for names in visible)))

    def _visit_all(self, nodes: Iterable[ast.AST | None], *, is_type: bool = False) -> None:
        before, self._in_type = self._in_type, is_type
        for node in nodes:
            if node:
                self.visit(node)
        self._in_type = before

    def _visit_scope(self, body: Iterable[ast.AST], names: frozenset[str], *, is_class: bool = False) -> None:
        self._scopes.append((is_class, names))
        self._visit_all(body)
        self._scopes.pop()

    def visit_Name(self, node: ast.Name) -> None:
        """Count a name that is read."""
        if not isinstance(node.ctx, ast.Store):
            self._use(node.id, node.lineno)

    def visit_Global(self, node: ast.Global) -> None:
        """Count a name that is about to be rebound."""
        for name in node.names:
            self._use(name, node.lineno)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Read a string that stands for a type."""
        if self._in_type and isinstance(node.value, str):
            try:
                expression = ast.parse(node.value.strip(), mode="eval").body
            except SyntaxError:
                return
            for child in ast.walk(expression):
                if isinstance(child, (ast.expr, ast.keyword)):
                    child.lineno = node.lineno
            self.visit(expression)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """Read the arguments of a generic type as types, those of Literal and Annotated's metadata as values."""
        self.visit(node.value)
        name = last_name(node.value)
        if name == "Literal":
            self._visit_all([node.slice])
        elif name == "Annotated" and isinstance(node.slice, ast.Tuple):
            self._visit_all(node.slice.elts[:1], is_type=True)
            self._visit_all(node.slice.elts[1:])
        else:
            self._visit_all([node.slice], is_type=self._in_type or name in GENERICS)

    def visit_Call(self, node: ast.Call) -> None:
        """Read the types that `cast` and `TypeVar` take as types."""
        name = last_name(node.func)
        types = {"cast": 1, "NewType": 2, "TypeVar": len(node.args)}.get(name, 0)
        first = 0 if name == "cast" else 1
        self._visit_all([node.func, *node.args[:first], *node.args[types:]] if types > first else [node.func])
        self._visit_all(node.args[first:types], is_type=True)
        self._visit_all([] if types > first else node.args)
        for keyword in node.keywords:
            self._visit_all([keyword.value], is_type=name == "TypeVar" and keyword.arg == "bound")

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Read the annotation as a type, and the value too where it is a type alias."""
        self._visit_all([node.annotation], is_type=True)
        self._visit_all([node.target])
        self._visit_all([node.value], is_type=last_name(node.annotation) == "TypeAlias")

    def visit_arguments(self, node: ast.arguments) -> None:
        """Read annotations and defaults, which belong to the scope around the function."""
        arguments = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.arg)]
        self._visit_all((argument.annotation for argument in arguments), is_type=True)
        self._visit_all([*node.defaults, *node.kw_defaults])

    def _visit_function(self, node: Function) -> None:
        self._visit_all([*node.decorator_list, node.args])
        self._visit_all([node.returns], is_type=True)
        self._visit_scope(node.body, locals_of(node.body, node.args))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Enter a function."""
        self._visit_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        """Enter a coroutine."""
        self._visit_function(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Enter a lambda."""
        self._visit_all([node.args])
        self._visit_scope([node.body], locals_of([node.body], node.args))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Enter a class body; functions inside do not see its names."""
        self._visit_all([*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)])
        self._visit_scope(node.body, locals_of(node.body), is_class=True)

    def _visit_comprehension(self, generators: list[ast.comprehension], *values: ast.expr) -> None:
        self._visit_all([generators[0].iter])
        names = locals_of(generator.target for generator in generators)
        rest = [node for generator in generators for node in (generator.target, *generator.ifs)]
        self._visit_scope([*rest, *(generator.iter for generator in generators[1:]), *values], names)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        """Enter a list comprehension."""
        self._visit_comprehension(node.generators, node.elt)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        """Enter a set comprehension."""
        self._visit_comprehension(node.generators, node.elt)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        """Enter a generator expression."""
        self._visit_comprehension(node.generators, node.elt)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        """Enter a dict comprehension."""
        self._visit_comprehension(node.generators, node.key, node.value)


@lru_cache(maxsize=8)
def uses_of(source: str) -> list[Use]:
    """Return every name the source reads, in the order of their lines."""
    uses = Uses()
    uses.visit(parsed(source).tree)
    return sorted(uses.found, key=lambda use: use.line)


def definitions_of(module: Module) -> dict[str, list[int]]:
    """Return top-level name -> the sections that bind it, in order."""
    found: dict[str, list[int]] = {}
    for statement in module.tree.body:
        for name, _ in bound_by(statement):
            where = module.position(statement.lineno)
            if where not in found.setdefault(name, []):
                found[name].append(where)
    return found


def first_line(node: Function | ast.ClassDef) -> int:
    """Return the line of the definition or of its first decorator."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def length(node: Function | ast.ClassDef) -> int:
    """Return the lines of a definition, decorators and docstring included."""
    return (node.end_lineno or node.lineno) - first_line(node) + 1


# Rules ---------------------------------------------------------------------------------------------------------------


def rule_banners(source: str) -> list[str]:
    """Hold that every ruler belongs to a banner, every banner to module level, every statement to a section."""
    module = parsed(source)
    found = list(module.malformed)
    found += [
        f"{b.line}: a half is called 'Core: ...' or 'Shell: ...'" for b in module.halves if not HALF.match(b.title)
    ]
    halves = [banner.title.partition(":")[0] for banner in module.halves]
    if halves not in (["Core"], ["Core", "Shell"]):
        found.append(f"1: the halves are Core, then Shell, not {halves}")
    for statement in module.tree.body:
        end = statement.end_lineno or statement.lineno
        found += [
            f"{section.first}: a banner inside a statement"
            for section in module.sections[1:]
            if statement.lineno <= section.first <= end
        ]
        if not module.section(statement.lineno).name:
            found.append(f"{statement.lineno}: a statement between the banner of a half and its first section")
    return found


def rank(name: str) -> tuple[int, int] | None:
    """Return the place of a section in DESIGN.md's table, None for an unknown one."""
    parent, colon, part = name.partition(": ")
    if parent not in ORDER or (colon and not part.strip()):
        return None
    if parent != "Commands" or not colon:
        return ORDER.index(parent), 0
    places = [i for i, command in enumerate(COMMANDS) if part.startswith(command)]
    return (ORDER.index(parent), places[0] + 1) if places else None


def rule_order(source: str) -> list[str]:
    """Hold that sections stand in the order of DESIGN.md's table, once each, in their half."""
    sections = parsed(source).named
    found = [] if sections else ["1: no sections"]
    highest = (-1, 0)
    seen: set[str] = set()
    for section in sections:
        place = rank(section.name)
        if place is None:
            found.append(f"{section.first}: unknown section '{section.name}'")
            continue
        if place < highest:
            found.append(f"{section.first}: section '{section.name}' belongs above '{ORDER[highest[0]]}'")
        if section.name in seen:
            found.append(f"{section.first}: a second section '{section.name}'")
        half = "Core" if section.parent in CORE_SECTIONS else "Shell"
        if section.half != half:
            found.append(f"{section.first}: section '{section.name}' belongs into the half '{half}'")
        highest = max(highest, place)
        seen.add(section.name)
    return found


def rule_map(source: str) -> list[str]:
    """Hold that the module's docstring names each section at the beginning of a line, in order."""
    module = parsed(source)
    lines = (ast.get_docstring(module.tree) or "").splitlines()
    found = []
    at = 0
    for section in module.named:
        name = rf"[\s*|\d.-]*{re.escape(section.name)}"
        entry = re.compile(name + r"(?=\s*$|\s\s|\t|\s*[:|(\u2013\u2014]|\s+-+>?\s)")
        line = next((i for i in range(at, len(lines)) if entry.match(lines[i])), None)
        if line is None:
            found.append(f"1: the docstring's section map lacks '{section.name}' on a line of its own, in its place")
        else:
            at = line + 1
    return found


def rule_upward(source: str) -> list[str]:
    """Hold that a section uses its own names and those above it, and that no name is bound by two sections."""
    module = parsed(source)
    definitions = definitions_of(module)
    found = [
        f"{module.sections[where[1]].first}: '{name}' is bound in '{module.sections[where[0]].name}' already"
        for name, where in definitions.items()
        if len(where) > 1 and name != "_"
    ]
    for use in uses_of(source):
        here = module.position(use.line)
        there = definitions.get(use.name, [here])[0] if use.is_global else here
        if there > here:
            names = module.sections[here].name, module.sections[there].name
            found.append(f"{use.line}: '{names[0]}' uses '{use.name}' of '{names[1]}', which stands below it")
    return found


def rule_private_names(source: str) -> list[str]:
    """Hold that a `_name` never leaves its section."""
    module = parsed(source)
    definitions = definitions_of(module)
    found = []
    for use in uses_of(source):
        here = module.position(use.line)
        there = definitions.get(use.name, [here])
        if use.is_global and is_private(use.name) and here not in there:
            owner = module.sections[there[0]].name
            found.append(f"{use.line}: '{module.sections[here].name}' uses the private '{use.name}' of '{owner}'")
    return found


def is_self(node: ast.AST) -> bool:
    """Tell whether a node is `self`, `cls` or `super()`."""
    if isinstance(node, ast.Call):
        return last_name(node.func) == "super"
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def private_members(module: Module) -> dict[str, set[int]]:
    """Return private attribute -> the sections whose classes define it, in the body, in __slots__ or through self."""
    found: dict[str, set[int]] = {}
    for node in ast.walk(module.tree):
        names: list[str] = []
        if isinstance(node, ast.ClassDef):
            names = [name for statement in node.body for name, _ in bound_by(statement)]
            slots = [s for s in node.body if isinstance(s, (ast.Assign, ast.AnnAssign)) and "__slots__" in ast.dump(s)]
            names += [str(child.value) for s in slots for child in ast.walk(s) if isinstance(child, ast.Constant)]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names = [node.attr]
        for name in filter(is_private, names):
            found.setdefault(name, set()).add(module.position(getattr(node, "lineno", 1)))
    return found


def rule_private_attributes(source: str) -> list[str]:
    """Hold that `x._y` is defined in the same section; `self._y` may come from a library's class too."""
    module = parsed(source)
    members = private_members(module)
    found = []
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr) or node.attr in PUBLIC_ATTRIBUTES:
            continue
        here = module.position(node.lineno)
        owners = members.get(node.attr, {here} if is_self(node.value) else set())
        if here not in owners:
            whose = ", ".join(f"'{module.sections[i].name}'" for i in sorted(owners)) or "a library"
            found.append(f"{node.lineno}: '{module.sections[here].name}' uses the private '.{node.attr}' of {whose}")
    return found


def top_statements(module: Module) -> list[ast.stmt]:
    """Return the statements before the first banner, also those inside `if` and `try`."""
    found: list[ast.stmt] = []
    rest = [statement for statement in module.tree.body if module.section(statement.lineno).name == TOP]
    while rest:
        statement = rest.pop(0)
        found.append(statement)
        if isinstance(statement, ast.If):
            rest += statement.body + statement.orelse
        elif isinstance(statement, ast.Try):
            rest += statement.body + statement.orelse + statement.finalbody
            rest += [inner for handler in statement.handlers for inner in handler.body]
    return found


def imported_from(statement: ast.stmt) -> Iterator[tuple[str, str]]:
    """Yield (module, bound name) for each import of a statement, lazy ones (`x = lazy("x")`) included."""
    if isinstance(statement, ast.Import):
        yield from ((alias.name, alias.asname or alias.name.partition(".")[0]) for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        yield from ((statement.module or "", alias.asname or alias.name) for alias in statement.names)
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, ast.Call):
        modules = [argument.value for argument in statement.value.args if isinstance(argument, ast.Constant)]
        for name, _ in bound_by(statement):
            yield from ((str(module), name) for module in modules or [""])


def rule_core(source: str) -> list[str]:
    """Hold that the core names no socket, thread, file, log or clock, under whatever name it was imported."""
    module = parsed(source)
    imports = [pair for statement in top_statements(module) for pair in imported_from(statement)]
    forbidden = CORE_FORBIDDEN | {name for origin, name in imports if origin.partition(".")[0] in CORE_MODULES}
    dates = {"datetime", "date"} | {name for origin, name in imports if origin == "datetime"}
    lazy = {name for origin, name in imports if not origin}
    found = [
        f"{use.line}: the core ('{module.section(use.line).name}') names '{use.name}'"
        for use in uses_of(source)
        if use.name in forbidden and module.section(use.line).is_core
    ]
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Attribute) or not module.section(node.lineno).is_core:
            continue
        is_clock = node.attr in CLOCK_ATTRIBUTES and (node.attr != "now" or last_name(node.value) in dates)
        if is_clock or (node.attr in CORE_MODULES and isinstance(node.value, ast.Name) and node.value.id in lazy):
            found.append(f"{node.lineno}: the core ('{module.section(node.lineno).name}') names '.{node.attr}'")
    return found


def rule_section_lines(source: str) -> list[str]:
    """Hold that a section has at most 450 lines."""
    lines = [(section, section.last - section.first + 1) for section in parsed(source).sections]
    return [
        f"{section.first}: section '{section.name}' has {count} lines, {SECTION_LINES} at most"
        for section, count in lines
        if count > SECTION_LINES
    ]


def rule_class_lines(source: str) -> list[str]:
    """Hold that a class has at most 200 lines."""
    classes = [node for node in ast.walk(parsed(source).tree) if isinstance(node, ast.ClassDef)]
    return [
        f"{node.lineno}: class '{node.name}' has {length(node)} lines, {CLASS_LINES} at most"
        for node in classes
        if length(node) > CLASS_LINES
    ]


def functions_of(module: Module) -> list[Function]:
    """Return all functions and methods but the dashboard's factories, whose classes' methods count instead."""
    functions = [node for node in ast.walk(module.tree) if isinstance(node, FUNCTIONS)]
    return [
        node
        for node in functions
        if module.section(node.lineno).parent != "Dashboard" or not any(isinstance(s, ast.ClassDef) for s in node.body)
    ]


def rule_function_lines(source: str) -> list[str]:
    """Hold that a function has at most 50 lines."""
    return [
        f"{node.lineno}: function '{node.name}' has {length(node)} lines, {FUNCTION_LINES} at most"
        for node in functions_of(parsed(source))
        if length(node) > FUNCTION_LINES
    ]


def function_mean(source: str) -> float:
    """Return the mean length of all functions."""
    lengths = [length(node) for node in functions_of(parsed(source))]
    return sum(lengths) / max(1, len(lengths))


def rule_function_mean(source: str) -> list[str]:
    """Hold that functions have at most 15 lines on average."""
    mean = function_mean(source)
    return [f"1: functions have {mean:.2f} lines on average, {FUNCTION_MEAN_LINES} at most"] * (
        mean > FUNCTION_MEAN_LINES
    )


def is_docstring(module: Module, statement: ast.stmt) -> bool:
    """Tell whether a statement is the module's docstring."""
    return statement is module.tree.body[0] and ast.get_docstring(module.tree) is not None


def rule_top(source: str) -> list[str]:
    """Hold that before the first section stand the docstring, imports, and the helpers that make a start cheap."""
    module = parsed(source)
    statements = top_statements(module)
    helpers = [statement for statement in statements if isinstance(statement, DEFINITIONS)]
    found = [
        f"{node.lineno}: '{node.name}' is a second helper before the first section"
        for node in helpers
        if node.name not in START_HELPERS
    ]
    for statement in statements:
        value = statement.value if isinstance(statement, (ast.Assign, ast.AnnAssign)) else None
        made = last_name(value.func) if isinstance(value, ast.Call) else ast.unparse(value) if value else None
        is_made = made in START_HELPERS or ast.unparse(statement) in START_NAMES
        is_import = isinstance(statement, (ast.Import, ast.ImportFrom, ast.If, ast.Try, ast.Pass))
        if not (is_made or is_import or statement in helpers or is_docstring(module, statement)):
            found.append(f"{statement.lineno}: before the first section stand only imports and start helpers")
    return found


def rule_imports(source: str) -> list[str]:
    """Hold that imports stand before the first section, none in disguise below it."""
    module = parsed(source)
    found = []
    for node in ast.walk(module.tree):
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        is_disguised = last_name(node) in {"__import__", "importlib", "import_module"}
        if isinstance(node, (ast.stmt, ast.expr)) and (is_import or is_disguised):
            where = module.section(node.lineno)
            if where.name != TOP:
                found.append(f"{node.lineno}: an import in '{where.name}'; imports stand at the top")
    return found


def is_broad(node: ast.AST) -> bool:
    """Tell whether a node catches everything: a bare except, `except Exception` or `suppress(Exception)`."""
    if isinstance(node, ast.ExceptHandler):
        caught: list[ast.expr | None] = [*node.type.elts] if isinstance(node.type, ast.Tuple) else [node.type]
        return node.type is None or any(last_name(name) in {"Exception", "BaseException"} for name in caught)
    if isinstance(node, ast.Call) and last_name(node.func) == "suppress":
        return any(last_name(name) in {"Exception", "BaseException"} for name in node.args)
    return False


def broad_excepts(node: ast.AST, function: str = "") -> Iterator[tuple[int, str]]:
    """Yield the line of each broad except, and the function around it as a dotted path."""
    if isinstance(node, DEFINITIONS):
        function = f"{function}.{node.name}".lstrip(".")
    elif isinstance(node, (ast.ExceptHandler, ast.Call)) and is_broad(node):
        yield node.lineno, function
    for child in ast.iter_child_nodes(node):
        yield from broad_excepts(child, function)


def rule_broad_except(source: str) -> list[str]:
    """Hold that only the reactor's dispatch and `main` catch everything."""
    module = parsed(source)
    found = []
    dispatch = ""
    for line, function in broad_excepts(module.tree):
        parent = module.section(line).parent
        if parent == "Reactor" and function and dispatch in ("", function):
            dispatch = function
        elif (parent, function) != ("Command line", "main"):
            found.append(f"{line}: a broad except in '{function}'; only the reactor's dispatch and main have one")
    return found


def rule_words(source: str) -> list[str]:
    """Hold that nothing speaks of limactl, libvirt or SSH."""
    return [
        f"{i}: speaks of '{match.group()}'"
        for i, line in enumerate(source.splitlines(), start=1)
        for match in FORBIDDEN_WORDS.finditer(line)
    ]


RULES: Final[dict[str, Callable[[str], list[str]]]] = {
    "banners": rule_banners,
    "order": rule_order,
    "map": rule_map,
    "upward": rule_upward,
    "private names": rule_private_names,
    "private attributes": rule_private_attributes,
    "core": rule_core,
    "section lines": rule_section_lines,
    "class lines": rule_class_lines,
    "function lines": rule_function_lines,
    "function mean": rule_function_mean,
    "top": rule_top,
    "imports": rule_imports,
    "broad except": rule_broad_except,
    "words": rule_words,
}

# The module itself ---------------------------------------------------------------------------------------------------


def real_source() -> str:
    """Return the text of the module."""
    return MODULE.read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", RULES)
def test_the_module_keeps_the_rule(rule: str) -> None:
    """The module violates no rule."""
    assert RULES[rule](real_source()) == []


def test_the_mean_length_of_functions(record_property: Callable[[str, object], None]) -> None:
    """The mean is said in the test's report, whether it is good or not."""
    mean = function_mean(real_source())
    record_property("function_mean_lines", round(mean, 2))
    assert 0 < mean <= FUNCTION_MEAN_LINES, f"functions have {mean:.2f} lines on average"


def test_templates_and_build_speak_of_no_forbidden_thing() -> None:
    """What the program emits and how it is built keep the rule of words, in contents and names."""
    templates = [path for path in sorted((ROOT / "service-templates").rglob("*")) if path.is_file()]
    assert templates
    for path in [ROOT / "build.sh", *templates]:
        assert rule_words(path.name + "\n" + path.read_text(encoding="utf-8")) == [], path


# Planted violations --------------------------------------------------------------------------------------------------

# `#- Name` and `#= Name` stand for banners.
SKETCH: Final = '''\
"""Clean: a module that keeps every rule, and comes close to breaking most.

    Limits           sizes; later sections are named in prose freely: Store, Reactor, main
    Text and time    text
    Projection       rows
    Projection: reports
    Store - what is known
    Reactor          loop
    Dashboard        app
    Commands: reading
    Command line     parser
"""

from __future__ import annotations

import importlib
import os
import sys
import time as clock
from datetime import datetime
from typing import TYPE_CHECKING, Any, Callable, Final, Literal, NamedTuple, Union

if TYPE_CHECKING:
    import textual
    import yaml


def _lazy(name: str) -> Any:
    import types
    return importlib.import_module(name)


yaml = _lazy("yaml")
secure = _lazy("ssl")

#= Core: bytes and time in, values out
#- Limits
WAIT_S: Final = 1.0
_MARGIN_S: Final = 0.5
#- Text and time
class Tick(NamedTuple):
    """A moment; the name of a field is no clock."""

    time: float
    now: float


Json = Union[None, str, list["Json"], dict[str, "Json"]]
Kind = Literal["main", "Loop", "time"]


def parse_time(text: str, zone: Callable[[str], Any]) -> Tick:
    """Return a moment; attributes and keywords are free."""
    zone("UTC").open(text)
    return Tick(time=datetime.fromisoformat(text).timestamp(), now=0.0)._replace(now=1.0)
#- Projection
def row_of(job: Tick, kind: Kind = "main") -> Tick:
    """Return a row; a local name may be that of a section below."""
    main = [app for app in (job, kind) if app]
    for step in main:
        step.send(lambda Loop: Loop(job.now))
    return job
#- Projection: reports
class Report:
    """Its own private attributes are its own."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes, self._step = b"", 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Report) and other._bytes == self._bytes

    def step(self, now: float) -> None:
        """Use a name from above, and its own."""
        self._step += int(now + WAIT_S)
        self._unknown_of_a_library()
#- Store
TEXT = """
# ----------------------------------------------------------------------------------------------------------------------
# A banner in a string is none
# ----------------------------------------------------------------------------------------------------------------------
"""
STORE: Report = Report()  # wishshell, sshd and lima are other words
#= Shell: a thin one
#- Reactor
class Loop:
    """Sockets."""

    def dispatch(self, call: Callable[[], None]) -> None:
        """Call it."""
        try:
            call()
        except Exception:
            sys.stderr.write(str(clock.monotonic()))
        except (ValueError, BaseException):
            raise
#- Dashboard
def app_class() -> Any:
    """Return the app's class, of any length."""

    class App(textual.App):
        def on_mount(self) -> None:
            self._loop = Loop()
@filler@
    return App
#- Commands: reading
def list_runs(out: Callable[[str], None]) -> None:
    """List."""
    out(os.sep)
#- Command line
def main() -> int:
    """Run."""
    try:
        list_runs(print)
    except Exception:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''


def expanded(sketch: str) -> str:
    """Return a source with real banners and a long factory."""
    sketch = sketch.replace("@filler@", "\n".join(f"        field_{i} = {i}" for i in range(2 * FUNCTION_LINES)))
    return re.sub(r"(?m)^#([-=]) (.*)$", lambda m: f"\n# {m[1] * 118}\n# {m[2]}\n# {m[1] * 118}\n", sketch)


def changed(old: str, new: str) -> str:
    """Return the clean source with one piece of its sketch replaced."""
    assert SKETCH.count(old) == 1, old
    return expanded(SKETCH.replace(old, new))


def planted(source: str, section: str, text: str) -> str:
    """Return a source with text planted below the banner of a section."""
    where = next(found for found in parsed(source).named if found.name == section)
    lines = source.splitlines()
    at = where.first - 1 + BANNER_LINES
    return "\n".join([*lines[:at], "", *text.splitlines(), "", *lines[at:], ""])


def broken_rules(source: str) -> list[str]:
    """Return the names of the rules that a source violates."""
    return [name for name, rule in RULES.items() if rule(source)]


def numbered(names: Iterable[str]) -> list[str]:
    """Return short names of test cases: their sources would be long ones."""
    return [f"{name} {i}" for i, name in enumerate(names)]


def function(lines: int, name: str = "planted") -> str:
    """Return a function of so many lines."""
    return "\n".join([f"def {name}() -> None:", *["    pass"] * (lines - 1)])


def a_class(lines: int) -> str:
    """Return a class of so many lines."""
    return "\n".join(["class Planted:", *[f"    field_{i}: int" for i in range(lines - 1)]])


BROAD: Final = "def planted() -> None:\n    try:\n        pass\n    except {}:\n        pass"
RULER_LINE: Final = "# " + "-" * 70

PLANTED: Final = [
    ("banners", "Limits", RULER_LINE),
    ("banners", "Limits", f"{RULER_LINE}\n# Limits\n# {'-' * 69}"),
    ("banners", "Limits", f"{RULER_LINE}\n# Limits\n# {'=' * 70}"),
    ("banners", "Limits", f"{RULER_LINE}\n\n# Limits\n{RULER_LINE}"),
    ("banners", "Limits", f"if WAIT_S:\n    pass\n    {RULER_LINE}"),
    ("upward", "Limits", "PLANTED = STORE"),
    ("upward", "Limits", "def planted() -> int:\n    return [1 for _ in STORE]"),
    ("upward", "Limits", "def planted(x: Report) -> int: ..."),
    ("upward", "Limits", "def planted(x: 'list[Report]') -> int: ..."),
    ("upward", "Limits", "def planted() -> Callable[['Report'], int]: ..."),
    ("upward", "Limits", "@row_of\ndef planted() -> int: ..."),
    ("upward", "Limits", "def planted(x: int = STORE) -> int: ..."),
    ("upward", "Limits", "def planted(main: int) -> int:\n    return lambda: row_of"),
    ("upward", "Limits", "def planted(x: Any = lambda Loop: Loop) -> Any:\n    return Loop"),
    ("upward", "Limits", "class Planted(Report): ..."),
    ("upward", "Limits", "class Planted(list['Report']): ..."),
    ("upward", "Limits", "class Planted:\n    Loop = 1\n    def get(self) -> int:\n        return Loop"),
    ("upward", "Limits", "class Planted:\n    field: 'Report'"),
    ("upward", "Limits", "Planted = Union[int, 'Report']"),
    ("upward", "Limits", "PLANTED = cast('Report', 1)"),
    ("upward", "Limits", "PLANTED = TypeVar('PLANTED', bound='Report')"),
    ("upward", "Limits", "def planted() -> None:\n    global STORE\n    STORE = 1"),
    ("upward", "Projection", "PLANTED = Report"),
    ("upward", "Reactor", "PLANTED = lambda: main()"),
    ("upward", "Reactor", "STORE = 1"),
    ("private names", "Text and time", "PLANTED = _MARGIN_S"),
    ("private names", "Command line", "def planted() -> None:\n    return _MARGIN_S"),
    ("private names", "Command line", "PLANTED = _lazy('json')"),
    ("private attributes", "Store", "def planted(x: Report) -> None:\n    x._bytes = b''"),
    ("private attributes", "Store", "PLANTED = Report._step"),
    ("private attributes", "Store", "class Planted(Report):\n    def get(self) -> int:\n        return self._step"),
    ("private attributes", "Store", "PLANTED = yaml._yaml"),
    ("private attributes", "Store", "def planted(self: Any) -> None:\n    return self.report._step"),
    *(("core", "Text and time", f"PLANTED = {name}") for name in sorted(CORE_FORBIDDEN - {"__import__", "importlib"})),
    ("core", "Limits", "def planted(time: float) -> float:\n    return time"),
    ("core", "Limits", "def planted(x: 'os.PathLike') -> float: ..."),
    ("core", "Limits", "def planted(x: socket.socket) -> float: ..."),
    ("core", "Limits", "PLANTED = clock.monotonic()"),
    ("core", "Limits", "PLANTED = secure.SSLContext"),
    ("core", "Limits", "PLANTED = datetime.now()"),
    ("core", "Limits", "PLANTED = datetime.datetime.now"),
    ("core", "Limits", "def planted(x: float) -> None:\n    return x.utcnow()"),
    ("core", "Limits", "PLANTED = datetime.today()"),
    ("section lines", "Limits", "# filler\n" * SECTION_LINES),
    ("class lines", "Store", a_class(CLASS_LINES + 1)),
    ("function lines", "Store", function(FUNCTION_LINES + 1)),
    ("function lines", "Store", "@staticmethod\n" + function(FUNCTION_LINES)),
    ("function lines", "Store", "class Planted:\n    " + function(FUNCTION_LINES + 1).replace("\n", "\n    ")),
    ("function lines", "Store", "def planted():\n    class Inside: ...\n" + "    pass\n" * FUNCTION_LINES),
    ("function lines", "Dashboard", function(FUNCTION_LINES + 1)),
    ("function mean", "Store", "\n".join(function(2 * FUNCTION_MEAN_LINES, f"planted_{i}") for i in range(12))),
    ("imports", "Reactor", "import json"),
    ("imports", "Reactor", "def planted() -> None:\n    from json import loads"),
    ("imports", "Reactor", "if TYPE_CHECKING:\n    import json"),
    ("imports", "Reactor", "PLANTED = importlib.import_module('json')"),
    ("imports", "Reactor", "PLANTED = __import__('json')"),
    *(("broad except", "Store", BROAD.format(f)) for f in ("Exception", "BaseException as e", "(OSError, Exception)")),
    ("broad except", "Store", BROAD.replace(" {}", "")),
    ("broad except", "Store", "def planted() -> None:\n    with suppress(Exception):\n        pass"),
    ("broad except", "Reactor", BROAD.format("Exception")),
    ("broad except", "Command line", BROAD.format("Exception")),
    ("broad except", "Command line", "try:\n    pass\nexcept Exception:\n    pass"),
    ("words", "Store", "# over SSH"),
    ("words", "Store", "ssh_key = 1"),
    ("words", "Store", "# Limactl"),
    ("words", "Store", "PLANTED = 'qemu-libvirtd'"),
]

CHANGED: Final = [
    ("banners", "#= Shell: a thin one\n", "#= Shell\n"),
    ("banners", "#= Shell: a thin one\n", "#= Shell: a thin one\nPLANTED = 1\n"),
    ("banners", "#- Limits\n", "if TYPE_CHECKING:\n    pass\n#- Limits\n    pass\n"),
    ("order core", "#= Shell: a thin one\n", ""),
    ("banners order core", "#= Shell: a thin one\n", "#= Core: more\n"),
    ("banners order", "#= Core: bytes and time in, values out\n", ""),
    ("order map", "#- Limits\n", "#- Sizes\n"),
    ("order map", "#- Projection: reports\n", "#- Reports: projection\n"),
    ("order map", "#- Commands: reading\n", "#- Commands: writing\n"),
    ("order map", "#- Text and time\n", "#- Views\n"),
    ("order map", "#- Projection\n", "#- Bus\n"),
    ("order map", "#- Projection\n", "#- Text and time\n"),
    ("order map", "#- Store\n", "#- Reactor: timers\n"),
    ("order map core broad except", "#- Reactor\n", "#- Views\n"),
    ("map", "    Store - what is known\n", ""),
    ("map", "    Projection: reports\n", ""),
    ("map", "    Limits  ", "    The Limits  "),
    ("map", "    Dashboard        app\n    Commands: reading\n", "    Commands: reading\n    Dashboard        app\n"),
    ("top", 'secure = _lazy("ssl")\n', 'secure = _lazy("ssl")\nPLANTED = 1\n'),
    ("top", 'secure = _lazy("ssl")\n', "def _second() -> None:\n    pass\n"),
    ("upward", 'secure = _lazy("ssl")\n', "secure = _lazy(WAIT_S)\n"),
]

ALLOWED: Final = [
    ("Limits", "# filler\n" * (SECTION_LINES - 10)),
    ("Store", a_class(CLASS_LINES)),
    ("Store", function(FUNCTION_LINES)),
    ("Store", "def planted(main: int, *Loop: int) -> int:\n    return main + sum(Loop)"),
    ("Store", "def planted() -> Any:\n    try:\n        return 1\n    except OSError as main:\n        return main"),
    ("Store", "class Planted:\n    main = 1\n    Loop = [x for x in (main,)]"),
    ("Store", "class Planted:\n    _bytes = b''\n\n\ndef planted(x: Planted) -> bytes:\n    return x._bytes"),
    ("Store", "def planted(x: Annotated[int, 'main'], y: dict[str, Literal['Loop']]) -> int: ..."),
    ("Store", "def planted(row: Any) -> int:\n    return row['main'] + row['time'] + row.time"),
    ("Store", "def planted(now: float, row: Any) -> int:\n    return row.now() + now"),
    ("Store", "if (planted := 1):\n    pass"),
    ("Reactor", "PLANTED = (open, print, os, clock.monotonic(), datetime.now())"),
]


def test_the_clean_source_is_clean() -> None:
    """No rule finds anything in a source that comes close to breaking most."""
    assert [found for rule in RULES.values() for found in rule(expanded(SKETCH))] == []


def test_an_empty_source_is_not_clean() -> None:
    """A module without sections is not a module that keeps the order."""
    assert broken_rules("") == ["banners", "order"]


@pytest.mark.parametrize(("section", "text"), ALLOWED, ids=numbered(case[0] for case in ALLOWED))
def test_what_is_allowed(section: str, text: str) -> None:
    """No rule is over-eager."""
    assert broken_rules(planted(expanded(SKETCH), section, text)) == []


@pytest.mark.parametrize(("rule", "section", "text"), PLANTED, ids=numbered(case[0] for case in PLANTED))
def test_a_planted_violation_is_caught(rule: str, section: str, text: str) -> None:
    """Exactly one rule catches it, and says where it is."""
    source = planted(expanded(SKETCH), section, text)
    assert broken_rules(source) == [rule]
    assert all(re.fullmatch(r"[1-9]\d*: .+", found) for found in RULES[rule](source))


@pytest.mark.parametrize(("rules", "old", "new"), CHANGED, ids=numbered(case[0] for case in CHANGED))
def test_a_changed_skeleton_is_caught(rules: str, old: str, new: str) -> None:
    """Banners, order, map and what stands on top are held."""
    assert " ".join(broken_rules(changed(old, new))) == rules


@pytest.mark.parametrize(("first", "second"), [("Limits", "Text and time"), ("Store", "Reactor")])
def test_exchanged_sections_are_caught(first: str, second: str) -> None:
    """A section that stands in another's place is found by its place alone, whatever the map says."""
    sketch = SKETCH.replace(f"#- {first}\n", "#- @\n").replace(f"#- {second}\n", f"#- {first}\n")
    assert RULES["order"](expanded(sketch.replace("#- @\n", f"#- {second}\n")))


def test_importing_in_the_core_is_caught_twice() -> None:
    """The core does not import by hand either."""
    for text in ("PLANTED = __import__('os')", "PLANTED = importlib.reload"):
        assert broken_rules(planted(expanded(SKETCH), "Store", text)) == ["core", "imports"]


def test_a_violation_names_its_line() -> None:
    """The line is that of the use, not of the definition."""
    source = planted(expanded(SKETCH), "Limits", "PLANTED = STORE")
    line = source.splitlines().index("PLANTED = STORE") + 1
    assert rule_upward(source) == [f"{line}: 'Limits' uses 'STORE' of 'Store', which stands below it"]


# Planted into the module: `{last}` is a name of its last section.
REAL: Final = [
    ("banners", "first", RULER_LINE),
    ("order", "first", f"{RULER_LINE}\n# Helpers\n{RULER_LINE}"),
    ("upward", "first", "def planted() -> None:\n    {last}()"),
    ("upward", "first", "def planted(x: 'list[{last}]') -> None: ..."),
    ("private names", "both", "_planted = 1 | planted = _planted"),
    ("private attributes", "both", "class Planted:\n    _planted = 1 | planted = Planted._planted"),
    ("core", "first", "planted = open"),
    ("core", "first", "def planted(now: datetime) -> None:\n    datetime.now()"),
    ("section lines", "first", "# filler\n" * SECTION_LINES),
    ("class lines", "first", a_class(CLASS_LINES + 1)),
    ("function lines", "first", function(FUNCTION_LINES + 1)),
    ("imports", "last", "def planted() -> None:\n    import json"),
    ("broad except", "first", BROAD.format("Exception")),
    ("words", "last", "# over ssh"),
]


@pytest.mark.parametrize(("rule", "where", "text"), REAL, ids=numbered(case[0] for case in REAL))
def test_a_violation_planted_into_the_module_is_caught(rule: str, where: str, text: str) -> None:
    """The rules see in the module what they see in the small source: each finds more than before."""
    source = real_source()
    module = parsed(source)
    first, last = module.named[0].name, module.named[-1].name
    below = [name for name, there in definitions_of(module).items() if module.sections[there[0]].name == last]
    above, _, beneath = text.replace("{last}", below[-1]).partition(" | ")
    broken = planted(source, last if where == "last" else first, above)
    broken = planted(broken, last, beneath) if beneath else broken
    assert len(RULES[rule](broken)) > len(RULES[rule](source))


def test_long_functions_planted_into_the_module_move_its_mean() -> None:
    """The mean is taken over all functions, the planted ones included."""
    source = real_source()
    count = len(functions_of(parsed(source)))
    text = "\n".join(function(FUNCTION_LINES, f"planted_{i}") for i in range(count))
    assert rule_function_mean(planted(source, parsed(source).named[0].name, text))


if __name__ == "__main__":
    SOURCE = real_source()
    for rule_name, check in RULES.items():
        sys.stdout.writelines(f"{MODULE.name}:{found} [{rule_name}]\n" for found in check(SOURCE))
    sys.stdout.write(f"functions have {function_mean(SOURCE):.2f} lines on average\n")
