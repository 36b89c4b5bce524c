"""The contract with TensorRT, checked without TensorRT: every name and signature that the target uses exists in the real
Python bindings of 10.3 (JetPack 6) and of 11.

The bindings are imported over stand-in libraries, in a process of their own. What the target uses is read from its source:
attributes are followed from `trt`, and from whatever is annotated `trt.Something` or returned by a method whose docstring
(pybind11's) names its type. A name that either version lacks fails, unless the code asks for it with hasattr.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDINS = Path(__file__).parent / "standins"
SOURCES = sorted((ROOT / "targets").glob("tensorrt*.py"))
VERSIONS = {"10": "10.3.0", "11": "11.4.0.106"}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")

each_version = pytest.mark.parametrize("major", sorted(VERSIONS))


@pytest.fixture(scope="session")
def apis(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {major: describe(major, tmp_path_factory.mktemp(f"libraries-{major}")) for major in VERSIONS}


def describe(major: str, libraries: Path) -> dict[str, Any]:
    bindings = ROOT / "build" / f"tensorrt-{major}"
    if not (bindings / "tensorrt_bindings").is_dir():
        pytest.fail(f"TensorRT's bindings are not in {bindings}. Run: make build/tensorrt-{major}", pytrace=False)
    for name in LIBRARIES:
        library = f"lib{name}.so.{major}"
        command = [
            "cc",
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{library}",
            "-o",
            libraries / library,
            STANDINS / "nvinfer.c",
        ]
        subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, STANDINS / "describe_tensorrt.py", ROOT],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(bindings)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    api: dict[str, Any] = json.loads(done.stdout)
    return api


@dataclass(frozen=True)
class Kind:
    """What is known of an expression: the module, a class, an object of one, or a method of one."""

    what: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join(("trt", *self.path))


@dataclass
class Reader:
    """Follows one source file against one version's API. `optional` are the names that the code asks for first."""

    names: dict[str, Any]
    uses: set[str] = field(default_factory=set)
    optional: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    own: dict[str, Kind | None] = field(default_factory=dict)  # what the source's own functions return

    def read(self, source: str) -> Reader:
        tree = ast.parse(source)
        self.optional = {str(Kind("class", (*path, name))) for path, name in _asked_for(tree)}
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        self.own = {function.name: self.annotated(function.returns) for function in functions}
        self.block(tree.body, {})
        return self

    def block(self, body: list[ast.stmt], known: dict[str, Kind | None]) -> None:
        for statement in body:
            self.statement(statement, known)

    def statement(self, node: ast.stmt, known: dict[str, Kind | None]) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.definition(node, known)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            kind = self.expression(node.value, known)
            self.bind(node.target, self.annotated(node.annotation) or kind, known)
        elif isinstance(node, ast.Assign):
            kind = self.expression(node.value, known)
            for target in node.targets:
                self.assign(target, kind, node, known)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self.statement(child, known)
                elif isinstance(child, ast.expr):
                    self.expression(child, known)

    def definition(self, node: ast.FunctionDef | ast.ClassDef, known: dict[str, Kind | None]) -> None:
        inner = dict(known)
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            inner |= {one.arg: self.annotated(one.annotation) for one in arguments if one.arg != "trt"}
        else:
            for base in node.bases:
                kind = self.expression(base, known)
                if kind is not None and kind.what == "class":
                    self.overrides(node, kind)
        self.block(node.body, inner)

    def overrides(self, node: ast.ClassDef, base: Kind) -> None:
        """Each public method with as many arguments as the base's: else TensorRT would never call it."""
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name in self.member(base.path)["members"]:
                given = len(method.args.args) - 1
                self.called(Kind("method", (*base.path, method.name)), given, set(), method)

    def assign(self, target: ast.expr, kind: Kind | None, node: ast.Assign, known: dict[str, Kind | None]) -> None:
        if isinstance(target, ast.Attribute) and target.attr == "__class__":
            self.bind(target.value, Kind("object", kind.path) if kind else None, known)
        elif isinstance(target, ast.Attribute):
            owner = self.expression(target.value, known)
            if owner is not None:
                used = self.attribute(owner, target.attr, node, writing=True)
                if used is not None and used.what == "fixed":
                    self.faults.append(f"{used} cannot be set, line {node.lineno}")
        elif isinstance(target, ast.Name):
            self.bind(target, kind, known)

    def bind(self, target: ast.expr, kind: Kind | None, known: dict[str, Kind | None]) -> None:
        if isinstance(target, ast.Name):
            known[target.id] = kind

    def annotated(self, annotation: ast.expr | None) -> Kind | None:
        """`trt.X`, `trt.X | None`."""
        for node in ast.walk(annotation) if annotation is not None else ():
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trt":
                kind = self.attribute(Kind("module"), node.attr, node)
                return Kind("object", kind.path) if kind else None
        return None

    def expression(self, node: ast.expr, known: dict[str, Kind | None]) -> Kind | None:
        if isinstance(node, ast.Name):
            return Kind("module") if node.id == "trt" else known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.expression(node.value, known)
            return None if owner is None else self.attribute(owner, node.attr, node)
        if isinstance(node, ast.Call):
            return self.call(node, known)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.expression(child, known)
            elif isinstance(child, ast.comprehension):
                self.expression(child.iter, known)
        return None

    def call(self, node: ast.Call, known: dict[str, Kind | None]) -> Kind | None:
        called = self.expression(node.func, known)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.expression(argument, known)
        if called is None or called.what not in ("class", "method"):
            return self.own.get(node.func.id) if isinstance(node.func, ast.Name) else None
        keywords = {keyword.arg or "" for keyword in node.keywords}
        if called.what == "class":
            self.called(Kind("method", (*called.path, "__init__")), len(node.args), keywords, node)
            return Kind("object", called.path)
        if called.path[-1] == "__init__":  # Base.__init__(self)
            return None
        return self.called(called, len(node.args), keywords, node)

    def called(self, method: Kind, given: int, keywords: set[str], node: ast.AST) -> Kind | None:
        """Check the arguments against the docstring's signatures; returns what the method returns."""
        self.uses.add(str(method))
        signatures = list(_signatures(self.member(method.path)["doc"]))
        for names, required, returns in signatures:
            if given <= len(names) and keywords <= set(names[given:]) and required <= given + len(keywords):
                return self.returned(returns, method)
        if signatures:
            self.faults.append(f"{method} takes {signatures[0][0]}, not {given} and {keywords}, line {node.lineno}")
        return None

    def returned(self, text: str, method: Kind) -> Kind | None:
        last = text.rpartition(".")[2]
        if last in self.names and self.names[last]["kind"] == "class":
            return Kind("object", (last,))
        return Kind("opaque", method.path) if "::" in text else None

    def attribute(self, owner: Kind, name: str, node: ast.AST, *, writing: bool = False) -> Kind | None:
        if owner.what == "opaque":
            self.faults.append(f"what {owner} returns needs an annotation, line {node.lineno}")
            return None
        if owner.what not in ("module", "class", "object"):
            return None
        path = (*owner.path, name)
        used = Kind("class", path)
        found = self.member(path)
        self.uses.add(str(used))
        if found is None:
            if str(used) not in self.optional:
                self.faults.append(f"{used} does not exist, line {node.lineno}")
            return None
        if found["kind"] == "class":
            return used
        if found["kind"] == "method":
            return Kind("method", path)
        if found["kind"] == "property":
            if writing and not found["settable"]:
                return Kind("fixed", path)
            return self.returned(found["doc"].rpartition("->")[2].strip(), used)
        return Kind("object", tuple(found["type"].split("."))) if self.member(tuple(found["type"].split("."))) else None

    def member(self, path: tuple[str, ...]) -> Any:
        found: Any = {"members": self.names}
        for name in path:
            found = found.get("members", {}).get(name) if found else None
        return found


def _asked_for(tree: ast.Module) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path of the class, name) of every hasattr(trt.X, "NAME")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            owner, name = node.args[0], node.args[1]
            if isinstance(owner, ast.Attribute) and isinstance(name, ast.Constant):
                yield (owner.attr,), str(name.value)


def _signatures(doc: str) -> Iterator[tuple[list[str], int, str]]:
    """(argument names without self, how many are required, returned type) of each signature in a pybind11 docstring."""
    for arguments, returns in re.findall(r"^(?:\d+\. )?\w+\((?!\*args)(.*)\) -> (.+)$", doc, re.MULTILINE):
        parts = re.split(r", (?=\w+: )", arguments)[1:]
        yield [part.partition(":")[0] for part in parts], sum(" = " not in part for part in parts), returns


def faults(api: dict[str, Any], *sources: str) -> list[str]:
    return [fault for source in sources for fault in Reader(api["names"]).read(source).faults]


def texts() -> list[str]:
    return [path.read_text() for path in SOURCES]


@each_version
def test_the_bindings_are_of_the_version_that_is_meant(major: str, apis: dict[str, Any]) -> None:
    assert apis[major]["version"] == VERSIONS[major]


@each_version
def test_every_name_and_signature_that_the_target_uses_exists(major: str, apis: dict[str, Any]) -> None:
    assert faults(apis[major], *texts()) == []


@each_version
def test_what_is_read_from_the_source_is_what_the_target_uses(major: str, apis: dict[str, Any]) -> None:
    """Guards the reader itself: one that follows nothing would find no fault either."""
    uses = set().union(*(Reader(apis[major]["names"]).read(source).uses for source in texts()))

    assert {
        "trt.Builder.create_network",
        "trt.Builder.build_serialized_network",
        "trt.IBuilderConfig.set_memory_pool_limit",
        "trt.MemoryPoolType.WORKSPACE",
        "trt.IBuilderConfig.builder_optimization_level",
        "trt.IBuilderConfig.profiling_verbosity",
        "trt.ProfilingVerbosity.DETAILED",
        "trt.IBuilderConfig.progress_monitor",
        "trt.IBuilderConfig.create_timing_cache",
        "trt.IBuilderConfig.set_timing_cache",
        "trt.ITimingCache.serialize",
        "trt.OnnxParser.__init__",
        "trt.OnnxParser.parse_from_file",
        "trt.OnnxParser.num_errors",
        "trt.ParserError.node_operator",
        "trt.INetworkDefinition.get_input",
        "trt.ITensor.shape",
        "trt.INetworkDefinition.get_layer",
        "trt.IConvolutionLayer.metadata",
        "trt.IConvolutionLayer.kernel_size_nd",
        "trt.IConvolutionLayer.get_output",
        "trt.IDeconvolutionLayer.num_groups",
        "trt.IMatrixMultiplyLayer.op0",
        "trt.MatrixOperation.TRANSPOSE",
        "trt.Runtime.deserialize_cuda_engine",
        "trt.ICudaEngine.create_execution_context",
        "trt.ICudaEngine.get_tensor_dtype",
        "trt.DataType.name",
        "trt.EngineInspector.get_engine_information",
        "trt.LayerInformationFormat.JSON",
        "trt.IExecutionContext.profiler",
        "trt.IProfiler.report_layer_time",
        "trt.IExecutionContext.set_tensor_address",
        "trt.IExecutionContext.execute_async_v3",
        "trt.IProgressMonitor.phase_start",
        "trt.IProgressMonitor.step_complete",
        "trt.ILogger.log",
        "trt.ILogger.Severity.INTERNAL_ERROR",
    } <= uses


BREAKS = {
    "a method that does not exist": ("parse_from_file", "parse_from_disk", "trt.OnnxParser.parse_from_disk"),
    "a property that does not exist": ("parser.num_errors", "parser.num_faults", "trt.OnnxParser.num_faults"),
    "a class that does not exist": ("trt.OnnxParser(", "trt.OnnxReader(", "trt.OnnxReader"),
    "an enum member that does not exist": ("MemoryPoolType.WORKSPACE", "MemoryPoolType.SCRATCH", "SCRATCH"),
    "an argument too many": ("set_timing_cache(cache, False)", "set_timing_cache(cache, False, 1)", "set_timing_cache"),
    "an argument too few": ("set_timing_cache(cache, False)", "set_timing_cache(cache)", "set_timing_cache"),
    "a keyword that does not exist": ("set_timing_cache(cache, False)", "set_timing_cache(cache, ok=1)", "ok"),
    "a property that cannot be set": (
        "config.progress_monitor = ",
        "network.num_layers = ",
        "num_layers cannot be set",
    ),
    "a method behind a returned object": ("cache.serialize()", "cache.freeze()", "trt.ITimingCache.freeze"),
    "an override of another length": ("phase_name: str, step: int)", "phase_name: str)", "step_complete"),
    "a name behind an annotated object": ("error.node_operator()", "error.node_op()", "trt.ParserError.node_op"),
    "an object without an annotation": ("error: trt.ParserError = ", "error = ", "needs an annotation"),
}


@each_version
@pytest.mark.parametrize("what", sorted(BREAKS))
def test_a_use_that_a_version_lacks_is_found(what: str, major: str, apis: dict[str, Any]) -> None:
    old, new, said = BREAKS[what]
    broken = [text.replace(old, new) for text in texts()]
    assert broken != texts()

    found = faults(apis[major], *broken)

    assert found
    assert all(said in fault for fault in found)


def test_what_only_one_version_has_is_found_in_the_other(apis: dict[str, Any]) -> None:
    weak = "def f(trt, config: trt.IBuilderConfig):\n    config.set_flag(trt.BuilderFlag.INT8)\n"

    assert faults(apis["10"], weak) == []
    assert faults(apis["11"], weak) == ["trt.BuilderFlag.INT8 does not exist, line 2"]


@each_version
def test_a_name_that_is_asked_for_first_may_be_missing(major: str, apis: dict[str, Any]) -> None:
    asked = "def f(trt):\n    if hasattr(trt.BuilderFlag, 'FP16'):\n        print(trt.BuilderFlag.FP16)\n"

    assert faults(apis[major], asked) == []


@each_version
def test_the_targets_own_listeners_are_taken_for_tensorrts(major: str, apis: dict[str, Any]) -> None:
    tried = apis[major]["tried"]

    assert (tried["is_logger"], tried["is_monitor"], tried["goes_on"]) == (True, True, True)
    assert tried["why"] == "said with ERROR"
    assert tried["dims"] == [1, 3, 8, 8]
    assert tried["types"] == ["BOOL", "FLOAT", "HALF", "INT32", "INT64", "INT8", "UINT8"]


def test_the_number_of_a_flag_moved_between_versions_and_the_target_follows_its_name(apis: dict[str, Any]) -> None:
    ten, eleven = apis["10"]["tried"], apis["11"]["tried"]

    assert (ten["strongly_typed"], eleven["strongly_typed"]) == (1, 0)
    assert (ten["flags"], eleven["flags"]) == (1 << 1, 0)


@each_version
def test_the_stand_in_package_of_the_other_tests_has_no_name_of_its_own(major: str, apis: dict[str, Any]) -> None:
    """Names of classes and of their public members; what the version dropped is allowed where the target asks for it."""
    names = apis[major]["names"]
    tree = ast.parse((STANDINS / "tensorrt.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    invented = [
        f"{cls.name}.{member.name}"
        for cls in classes
        if cls.name != "Settings"
        for member in cls.body
        if isinstance(member, ast.FunctionDef)
        and not member.name.startswith("_")
        and member.name not in names.get(cls.name, {"members": {}})["members"]
    ]

    assert invented == []
