"""Imports point downwards only, and some knowledge lives in one module only."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen

PROJECT = Path(__file__).parents[1]
DOMAINS = ("images", "machine", "processes", "files", "storage", "network", "workload")
LEAVES = ("agent.linux", "agent.errors", "agent.kernel_files")
PROTOCOL_WORDS = (
    "protocol.values",
    "protocol.machine",
    "protocol.constants",
    "protocol.errors",
    "protocol.retry",
)
STANDARD = frozenset(sys.stdlib_module_names)

# A package or module -> what of ours it may import beside itself. The longest name that matches
# a module is its rule.
OURS: dict[str, tuple[str, ...]] = {
    "protocol": (),
    "agent.linux": (),
    **{f"agent.{domain}": (*LEAVES, *PROTOCOL_WORDS) for domain in DOMAINS},
    "agent.workload": (*LEAVES, *PROTOCOL_WORDS, "agent.processes"),
    "agent.processes": (*LEAVES, *PROTOCOL_WORDS, "agent.images.overlay"),
    "agent": ("protocol",),
    "agent.handlers": (
        *(f"agent.{domain}" for domain in DOMAINS),
        *LEAVES,
        "agent.channel",
        "agent.services",
        "protocol",
    ),
    "initramfs": (),
    "initramfs.boot": ("initramfs", "protocol"),
    "initramfs.demo": ("initramfs", "protocol"),
    "initramfs.foreground": ("initramfs", "protocol"),
    # A machine of namespaces is made of the agent's own system calls.
    "initramfs.namespaces": ("initramfs", "agent.linux", "agent.processes.cgroup"),
    "initramfs.run_agent": ("agent.__main__",),
    "initramfs.open_root_disk": ("agent.storage.root_disk",),
}

# A package of others -> the only modules that may import it.
THEIRS: dict[str, tuple[str, ...]] = {
    "cattrs": ("protocol.converter", "protocol.codec"),
    "ctypes": ("agent.linux",),
    "oras": ("agent.images.registry",),
    "pybase64": ("protocol.base64_path", "protocol.converter", "protocol.codec"),
    "pyroute2": ("agent.network.links",),
    "rich": ("protocol.cli",),
    "typer": ("protocol.cli",),
    "trio": (
        "agent",
        "initramfs",
        "protocol.cli",
        "protocol.client",
        "protocol.stream",
        "protocol.workload_client",
    ),
}

# What protocol/ may import of others; trio only where it is named above.
PROTOCOL_LIBRARIES = ("attrs", "attr", "cattrs", "orjson", "pybase64", "rich", "trio", "typer")

# Modules that know JSON: the wire's, OCI's documents, crun's configuration, log lines.
JSON = (
    "protocol.codec",
    "protocol.converter",
    "agent.images",
    "agent.processes",
    "agent.workload.record",
    "agent.logs",
)

# Nothing of these is imported before it is used, so that the agent starts in time.
HEAVY = ("backports.zstd", "isal", "oras", "pyroute2", "requests", "ssl", "urllib3")


@frozen
class Import:
    """`module` imports `name`; `at_once`: when it is imported itself."""

    module: str
    name: str
    line: int
    at_once: bool

    def __str__(self) -> str:
        return f"{self.module} (line {self.line}) imports {self.name}"


def modules(package: str) -> dict[str, Path]:
    """The modules of a package below the project's root, by dotted name."""
    found = {}
    for path in sorted((PROJECT / package).rglob("*.py")):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(module: str, path: Path) -> Iterator[Import]:
    """All imports of a module, those of functions and of type checking included."""
    tree = ast.parse(path.read_bytes())
    in_functions = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    in_type_checking = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        at_once = id(node) not in in_functions and id(node) not in in_type_checking
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, at_once)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            assert node.module is not None
            for alias in node.names:
                # `from protocol import values` imports protocol.values.
                whole = f"{node.module}.{alias.name}"
                yield Import(
                    module, whole if whole in MODULES else node.module, node.lineno, at_once
                )


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


MODULES = {**modules("protocol"), **modules("agent"), **modules("initramfs")}
IMPORTS = [found for module, path in MODULES.items() for found in imports(module, path)]


def test_imports_point_downwards() -> None:
    wrong = []
    for found in IMPORTS:
        rules = [package for package in OURS if is_within(found.module, (package,))]
        if rules and found.name in MODULES:
            rule = max(rules, key=len)
            if not is_within(found.name, (rule, *OURS[rule])):
                wrong.append(str(found))
    assert wrong == []


def test_only_one_module_knows_each_library() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        for library, owners in THEIRS.items()
        if is_within(found.name, (library,)) and not is_within(found.module, owners)
    ]
    assert wrong == []


def test_only_the_codec_and_documents_of_others_know_json() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if is_within(found.name, ("json", "orjson"))
        and not is_within(found.module, (*JSON, "protocol.cli", "initramfs"))
    ]
    assert wrong == []


def test_the_system_calls_need_only_the_standard_library() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if is_within(found.module, ("agent.linux",))
        and found.name.partition(".")[0] not in STANDARD | {"agent"}
    ]
    assert wrong == []


def test_the_protocol_needs_only_its_own_few_libraries() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if is_within(found.module, ("protocol",))
        and found.name.partition(".")[0] not in STANDARD | {"protocol", *PROTOCOL_LIBRARIES}
    ]
    assert wrong == []


def test_the_agent_is_no_client() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if is_within(found.module, ("agent",))
        and is_within(
            found.name,
            ("protocol.cli", "protocol.client", "protocol.stream", "protocol.workload_client"),
        )
    ]
    assert wrong == []


def test_domains_never_see_messages_or_channels() -> None:
    domains = tuple(f"agent.{domain}" for domain in DOMAINS)
    hidden = ("protocol.requests", "protocol.responses", "agent.channel", "agent.handlers")
    wrong = [
        str(found)
        for found in IMPORTS
        if is_within(found.module, domains) and is_within(found.name, hidden)
    ]
    assert wrong == []


def test_only_the_configuration_reads_the_environment() -> None:
    readers = ("agent.config", "agent.__main__", "initramfs", "protocol.cli")
    wrong = [
        f"{module} (line {node.lineno}) reads the environment"
        for module, path in MODULES.items()
        if not is_within(module, readers)
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
    ]
    assert wrong == []


@pytest.mark.parametrize("start", ["agent.__main__", "agent.lifetime", "agent.handlers"])
def test_nothing_heavy_is_imported_before_it_is_needed(start: str) -> None:
    assert start in MODULES
    reached = {start}
    waiting = [start]
    wrong = []
    while waiting:
        module = waiting.pop()
        for found in IMPORTS:
            if found.module != module or not found.at_once:
                continue
            if is_within(found.name, HEAVY):
                wrong.append(str(found))
            if found.name in MODULES and found.name not in reached:
                reached.add(found.name)
                waiting.append(found.name)
    assert wrong == []


@pytest.mark.parametrize("package", ["protocol", "agent", "initramfs"])
def test_no_module_is_named_after_nothing(package: str) -> None:
    empty = {"utils", "helpers", "common", "manager", "base", "impl"}
    names = [name for name in MODULES if name.partition(".")[0] == package]
    assert [name for name in names if empty & set(name.split("."))] == []
