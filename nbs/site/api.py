"""The reference, read off the modules' text.

Nothing is imported, so neither PyTorch nor a GPU is needed to build it.
fastcore calls a comment beside an argument a docment. Here they are read with `ast` and `tokenize`.
"""

import ast
import html
import inspect
import io
import json
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

CELL = re.compile(r"^# %% (?:\.\./)*nbs/(\S+\.ipynb) #?(\w+)", re.MULTILINE)
FENCES = ":::::::"  # a class has methods inside: theirs is shorter


@dataclass
class Definition:
    "A function, class, method or value as the reference shows it."

    name: str
    kind: str  # "function", "class", "method", "property" or "data"
    line: int  # in the module, from 1
    signature: str = ""  # "(policy, n_frames, window=None)"
    docstring: str = ""
    arguments: list[tuple[str, str, str, str]] = field(
        default_factory=list
    )  # name, type, default, comment
    returns: tuple[str, str] = ("", "")  # type, comment
    options: tuple[str, ...] = ()  # of the directive: "classmethod", "staticmethod"
    bases: str = ""  # of a class
    methods: list["Definition"] = field(default_factory=list)


@dataclass
class Module:
    "A module as the reference shows it."

    name: str
    docstring: str
    definitions: list[Definition]
    cells: list[tuple[int, str, str]]  # line, notebook below nbs/, id of the cell
    handed_on: dict[str, str] = field(default_factory=dict)  # public name -> module it is from


def read_comments(
    source: str,  # Python
) -> dict[int, tuple[str, bool]]:  # line -> comment, and whether it has the line to itself
    "The comments of a module."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = (token.string.lstrip("#").strip(), alone)
    return found


def comment_of(
    node: ast.AST,  # an argument or a field
    comments: dict[int, tuple[str, bool]],
    last: int,  # the last line that belongs to it
) -> str:  # its docment
    "The comment beside an argument; if there is none, those right above it."
    for line in range(last, node.lineno - 1, -1):
        if line in comments and not comments[line][1]:
            return comments[line][0]
    above = []
    line = node.lineno - 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    return " ".join(above)


def read_arguments(
    node: ast.FunctionDef,
    comments: dict[int, tuple[str, bool]],
) -> tuple[list[tuple[str, str, str, str]], str]:  # (name, type, default, comment) each; signature
    "The arguments of a function as they are written, without self and cls."
    spec = node.args
    plain = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(plain) - len(spec.defaults)) + list(spec.defaults)
    rows = [(argument, "", default) for argument, default in zip(plain, defaults)]
    if spec.vararg:
        rows.append((spec.vararg, "*", None))
    rows += [(argument, "", value) for argument, value in zip(spec.kwonlyargs, spec.kw_defaults)]
    if spec.kwarg:
        rows.append((spec.kwarg, "**", None))
    arguments, words = [], []
    for argument, stars, default in rows:
        if argument.arg in ("self", "cls"):
            continue
        if argument in spec.kwonlyargs and not spec.vararg and "*" not in words:
            words.append("*")
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        value = ast.unparse(default) if default is not None else ""
        on_def_line = argument.lineno == node.lineno
        last = default.end_lineno if default is not None else argument.end_lineno
        comment = "" if on_def_line else comment_of(argument, comments, last)
        arguments.append((stars + argument.arg, annotation, value, comment))
        words.append(f"{stars}{argument.arg}={value}" if value else stars + argument.arg)
    return arguments, "(" + ", ".join(words) + ")"


def decorators(
    node: ast.FunctionDef | ast.ClassDef,
) -> dict[str, str]:  # name -> the decorator as it is written
    "The decorators of a definition."
    texts = [ast.unparse(item) for item in node.decorator_list]
    return {re.split(r"[.(]", text.removeprefix("functools."))[0]: text for text in texts}


def read_function(
    node: ast.FunctionDef,
    comments: dict[int, tuple[str, bool]],
    kind: str = "function",  # or "method"
) -> Definition:
    "Read one function or method."
    marks = decorators(node)
    arguments, signature = read_arguments(node, comments)
    returns = ("", "")
    if node.returns:
        comment = comments.get(node.returns.end_lineno, ("", True))
        returns = (ast.unparse(node.returns), "" if comment[1] else comment[0])
    options = tuple(mark for mark in ("classmethod", "staticmethod") if mark in marks)
    patched = marks.get("patch", "")
    if "cls_method" in patched:
        options = ("classmethod",)
    if kind == "method" and (
        "property" in marks or "cached_property" in marks or "as_prop" in patched
    ):
        kind, signature = "property", ""
    docstring = ast.get_docstring(node) or ""
    return Definition(
        node.name, kind, node.lineno, signature, docstring, arguments, returns, options
    )


def read_class(
    node: ast.ClassDef,
    comments: dict[int, tuple[str, bool]],
) -> Definition:
    "Read a class: how it is made, and its public methods."
    found = Definition(node.name, "class", node.lineno, "", ast.get_docstring(node) or "")
    found.bases = ", ".join(ast.unparse(base) for base in node.bases)
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    words = []
    for item in fields:
        value = ast.unparse(item.value) if item.value else ""
        name = ast.unparse(item.target)
        comment = comment_of(item, comments, item.end_lineno)
        found.arguments.append((name, ast.unparse(item.annotation), value, comment))
        words.append(f"{name}={value}" if value else name)
    if "dataclass" in decorators(node):
        found.signature = "(" + ", ".join(words) + ")"
    for item in node.body:
        if not isinstance(item, ast.FunctionDef):
            continue
        if item.name == "__init__":
            maker = read_function(item, comments)
            found.signature, found.arguments = maker.signature, maker.arguments
            found.docstring = "\n\n".join(filter(None, [found.docstring, maker.docstring]))
        elif item.name == "__call__" or item.name[0] != "_":
            found.methods.append(read_function(item, comments, "method"))
    return found


def read_values(
    node: ast.Assign | ast.AnnAssign,
    comments: dict[int, tuple[str, bool]],
) -> list[Definition]:  # one for each public name
    "Read `NAME = value`, also several at once. A long value is not shown: the notebook has it."
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [
        item.id for target in targets for item in ast.walk(target) if isinstance(item, ast.Name)
    ]
    value = ast.unparse(node.value) if node.value and len(names) == 1 else ""
    shown = value if len(value) < 80 else ""
    comment, alone = comments.get(node.end_lineno, ("", True))
    text = "" if alone else comment
    return [
        Definition(name, "data", node.lineno, "", text, returns=(shown, ""))
        for name in names
        if name[0] != "_"
    ]


def read_handed_on(
    tree: ast.Module,
) -> dict[str, str]:  # name -> module of the package that defines it
    "The public names that a module only hands on: imported, and in its `__all__`."
    exported, imported = set(), {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = set(ast.literal_eval(node.value))
        elif isinstance(node, ast.ImportFrom) and node.module:
            home = node.module.removeprefix("causal_story.")
            if node.level == 1 or home != node.module:
                imported |= {one.asname or one.name: home for one in node.names}
    return {name: home for name, home in imported.items() if name in exported}


def read_module(
    path: Path,  # causal_story/NAME.py
) -> Module:
    "Read a module: its public definitions in the order in which they stand."
    source = path.read_text(encoding="utf-8")
    tree, comments = ast.parse(source), read_comments(source)
    cells = [
        (source.count("\n", 0, match.start()) + 1, *match.groups())
        for match in CELL.finditer(source)
    ]
    found, classes = [], {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name[0] != "_":
            classes[node.name] = read_class(node, comments)
            found.append(classes[node.name])
        elif isinstance(node, ast.FunctionDef) and "patch" in decorators(node):
            owner = node.args.args[0].annotation if node.args.args else None
            owner = classes.get(ast.unparse(owner) if owner else "")
            if owner and (node.name == "__call__" or node.name[0] != "_"):
                owner.methods.append(read_function(node, comments, "method"))
        elif isinstance(node, ast.FunctionDef) and node.name[0] != "_":
            found.append(read_function(node, comments))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found += read_values(node, comments)
    docstring = ast.get_docstring(tree) or ""
    return Module(path.stem, docstring, found, cells, read_handed_on(tree))


# ---------------------------------------------------------------- writing pages


def as_html(
    text: str,  # a comment: plain text with `code`
) -> str:
    "A comment as HTML."
    pieces = re.split(r"`([^`]+)`", text)
    return "".join(
        f"<code>{html.escape(piece)}</code>" if number % 2 else html.escape(piece)
        for number, piece in enumerate(pieces)
    )


def as_markdown(
    docstring: str,  # plain text with `code`, paragraphs and lists
) -> str:
    "A docstring as Markdown: its words as they stand, its errors in a paragraph of their own."
    blocks = re.split(
        r"(^```.*?^```$)", inspect.cleandoc(docstring), flags=re.MULTILINE | re.DOTALL
    )
    for number in range(0, len(blocks), 2):
        pieces = re.split(r"(`[^`]+`)", blocks[number])
        pieces[::2] = [re.sub(r"([\\*_\[\]<>$#{}~])", r"\\\1", piece) for piece in pieces[::2]]
        text = "".join(pieces)
        text = re.sub(r"(?<=[.!?])\s+Raises ", "\n\nRaises ", text)
        blocks[number] = re.sub(r"(?m)^Raises ", "**Raises** ", text)
    return "".join(blocks)


def argument_list(
    definition: Definition,
) -> str:  # HTML, or nothing
    "Arguments with type, default and meaning; then what comes back."
    rows = []
    for name, annotation, default, comment in definition.arguments:
        if not (annotation or comment):
            continue
        head = f"<code><strong>{html.escape(name)}</strong></code>"
        head += f" <code>{html.escape(annotation)}</code>" if annotation else ""
        head += f" <span>default</span> <code>{html.escape(default)}</code>" if default else ""
        rows.append(f"<dt>{head}</dt><dd>{as_html(comment)}</dd>")
    kind, comment = definition.returns
    if definition.kind != "data" and kind not in ("", "None"):
        head = f"<span>returns</span> <code>{html.escape(kind)}</code>"
        rows.append(f"<dt>{head}</dt><dd>{as_html(comment)}</dd>")
    return '<dl class="arguments">' + "".join(rows) + "</dl>" if rows else ""


def entry(
    definition: Definition,
    module: Module,
    shown: set[str],  # ids of the cells that the site shows
    git_url: str,  # "" while the repository has no public home
    fence: str = FENCES,
) -> str:  # Markdown
    "One definition as a directive of Sphinx, so that search and index know it."
    head = f"{definition.name}{definition.signature}"
    lines = [f"{fence}{{py:{definition.kind}}} {head}"]
    lines += [f":{option}:" for option in definition.options]
    if definition.kind == "data" and definition.returns[0]:
        lines.append(f":value: {json.dumps(definition.returns[0])}")
    lines += ["", as_markdown(definition.docstring), "", argument_list(definition), ""]
    if definition.bases and definition.bases != "object":
        lines += [f"A kind of `{definition.bases}`.", ""]
    sources = []
    place = [cell for cell in module.cells if cell[0] <= definition.line]
    if place and place[-1][2] in shown:
        sources.append(f"[in the notebook](#cell-{place[-1][2]})")
    if git_url:
        sources.append(f"[source]({git_url}/causal_story/{module.name}.py#L{definition.line})")
    if sources:
        lines += ["{.source}", ", ".join(sources), ""]
    for method in definition.methods:
        lines += [entry(method, module, shown, git_url, fence[:-1]), ""]
    return "\n".join([*lines, fence])


def module_page(
    module: Module,
    shown: set[str],  # ids of the cells that the site shows
    titles: dict[str, str],  # notebook below nbs/ -> its title
    git_url: str = "",  # of the folder that holds causal_story/, at the branch
) -> str:  # Markdown
    "The reference of one module."
    homes = [name for name in dict.fromkeys(cell[1] for cell in module.cells) if name in titles]
    taught = ", ".join(f"[{titles[name]}](../{name})" for name in homes)
    lines = [f"# {module.name}", "", module.docstring, ""]
    lines += [f"Explained and tested in {taught}.", ""] if taught else []
    lines += [f"```{{py:module}} causal_story.{module.name}", "```", ""]
    for definition in module.definitions:
        lines += [entry(definition, module, shown, git_url), ""]
    if module.handed_on:
        names = [f"{{py:obj}}`{n} <causal_story.{m}.{n}>`" for n, m in module.handed_on.items()]
        lines += ["## From other modules", "", f"Found here too: {', '.join(names)}.", ""]
    return "\n".join(lines)
