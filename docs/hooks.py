"""What the site has beside the pages of docs/: those of the repository's root, files that pages link to, and the
commands and recipe keys as the program itself describes them.

Pages link to each other and to files of the repository by relative paths, as a code host wants them. A link that leaves
docs/ leads to a page made of that file. One that leads nowhere is left as it is, so that `mkdocs build --strict` fails.
"""

import inspect
import json
import re
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

import typer
from mkdocs.structure.files import File, InclusionLevel

from t3d.cli import app
from t3d.config import describe

ROOT = Path(__file__).parents[1]
OF_THE_ROOT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(\[[^\]]*\]\()([^)#\s:]+)(?=[)#])")


def page_of(path: str) -> str:
    """The page, or the file of the site, that a file of the repository becomes."""
    if path in OF_THE_ROOT:
        return OF_THE_ROOT[path]
    if path.endswith(".ipynb"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def path_of(page: str) -> str:
    """The file of the repository that a page was made of."""
    roots = {made: path for path, made in OF_THE_ROOT.items()}
    return roots.get(page) or (page.removeprefix("source/") if page.startswith("source/") else f"docs/{page}")


def target_of(path: str, link: str) -> str:
    """The file of the repository that a link in another one leads to."""
    return normpath(str(PurePosixPath(path).parent / link))


def on_files(files, config):
    """Add the pages that are not in docs/."""

    def add(page: str, text: str, inclusion=InclusionLevel.INCLUDED) -> None:
        files.append(File.generated(config, page, content=text, inclusion=inclusion))

    for path, page in OF_THE_ROOT.items():
        add(page, (ROOT / path).read_text())
    for path in ROOT.glob("docs/*.ipynb"):
        add(page_of(f"docs/{path.name}"), notebook(json.loads(path.read_text())))
    unread = [(path_of(file.src_uri), file.content_string) for file in files.documentation_pages()]
    while unread:
        path, text = unread.pop()
        for _, link in LINK.findall(text):
            target = target_of(path, link)
            if (ROOT / target).is_file() and files.get_file_from_path(page_of(target)) is None:
                content = (ROOT / target).read_text()
                if target.endswith(".md"):
                    unread.append((target, content))
                else:
                    content = f"# {target}\n\n````{(ROOT / target).suffix[1:] or 'text'}\n{content}\n````\n"
                add(page_of(target), content, InclusionLevel.NOT_IN_NAV)
    add("reference/commands.md", commands())
    add("reference/settings.md", settings())
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between pages."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # which there is the page alone
    here, path = PurePosixPath(page.file.src_uri).parent, path_of(page.file.src_uri)

    def led(match: re.Match) -> str:
        target = target_of(path, match[2])
        return match[1] + relpath(page_of(target), here) if (ROOT / target).is_file() else match[0]

    return LINK.sub(led, markdown)


class Markdown(typer.Context.formatter_class):
    """`--help` as Markdown."""

    def write_usage(self, prog, args="", prefix=None):
        self.write(f"```\n{prog} {args}\n```\n\n")

    def write_text(self, text):
        self.write(inspect.cleandoc(text) + "\n\n")

    @contextmanager
    def section(self, name):
        self.write(f"**{name}**\n\n")
        yield

    def write_dl(self, rows, col_max=30, col_spacing=2):
        self.write("| | |\n|---|---|\n")
        for name, text in rows:
            self.write(f"| `{name}` | {' '.join(text.split())} |\n")
        self.write("\n")


def notebook(content: dict) -> str:
    """A notebook, with the outputs that are kept in it, as Markdown."""
    parts = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/svg+xml" in data:
                svg = "".join(data["image/svg+xml"])
                parts.append(svg[svg.index("<svg") :].replace("\n", " "))
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            elif output["output_type"] == "stream":
                parts.append(f"````text\n{''.join(output['text'])}\n````")
    return "\n\n".join(parts)


def commands() -> str:
    """The help of every command."""
    group = typer.main.get_command(app)
    parts = ["# Commands", "What `t3d COMMAND --help` says."]
    for name, command in each(group):
        context = typer.Context(command, info_name=f"t3d {name}")
        formatter = Markdown()
        command.format_help(context, formatter)
        parts += [f"## t3d {name}", formatter.getvalue()]
    return "\n\n".join(parts)


def each(group, before: str = ""):
    """(name, command) of all commands, also those of groups within."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from each(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def settings() -> str:
    """What `t3d config` says."""
    return f"""# Recipe keys

What `t3d config` prints: every key of a recipe with its type, its default and what it does. Keys that belong to one
strategy, flight or objective begin with its name. `t3d config --all` adds what `train` inherits from transformers.

```yaml
{describe(False)}```
"""
