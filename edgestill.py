"""edgestill from Python: the functions behind the verbs, their types and their errors, under names that versions keep.

A name is imported from where it lives when it is first used, so that `import edgestill` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.comparison import Comparison
    from benchmarks.device.verify import verify_bundle
    from benchmarks.doctor import DevicesReport, DoctorReport, check_devices, check_this_machine
    from benchmarks.hardware.verb import HardwareReport, hardware_report
    from benchmarks.history import accept_change, add_to_history, check_history, keep_records, show_history
    from benchmarks.profile_report import Profile
    from benchmarks.report import render_report
    from benchmarks.selftest import SelfTest
    from pipeline.ablation.report import AblationReport
    from pipeline.ablation.run import ablate_recipe
    from pipeline.bring_your_own import bench_model, compile_model, lint_model, quantize_model
    from pipeline.bundles import bundle_schema, pack_bundle, portable_bundle, sign_bundle
    from pipeline.compare_models import compare_models, selftest_model
    from pipeline.matrix import MatrixReport, export_results, run_matrix
    from pipeline.onnx_ladder import Demands
    from pipeline.own_module import quantize_module
    from pipeline.profile_model import profile_model
    from pipeline.recipe import Recipe, load_recipe, recipe_schema
    from pipeline.run import RunResult, run_recipe
    from pipeline.verb_reports import BenchReport, CompileReport, LintReport, QuantizeReport
    from targets.errors import (
        BudgetError,
        DataError,
        DeviceError,
        EdgestillError,
        GateError,
        IntegrityError,
        MeasurementError,
        ModelError,
        RecipeError,
        TargetError,
        TrainingError,
    )

__all__ = [
    "AblationReport",
    "BenchReport",
    "BudgetError",
    "Comparison",
    "CompileReport",
    "DataError",
    "Demands",
    "DeviceError",
    "DevicesReport",
    "DoctorReport",
    "EdgestillError",
    "GateError",
    "HardwareReport",
    "IntegrityError",
    "LintReport",
    "MatrixReport",
    "MeasurementError",
    "ModelError",
    "Profile",
    "QuantizeReport",
    "Recipe",
    "RecipeError",
    "RunResult",
    "SelfTest",
    "TargetError",
    "TrainingError",
    "ablate_recipe",
    "accept_change",
    "add_to_history",
    "bench_model",
    "bundle_schema",
    "check_devices",
    "check_history",
    "check_this_machine",
    "compare_models",
    "compile_model",
    "export_results",
    "hardware_report",
    "keep_records",
    "lint_model",
    "load_recipe",
    "pack_bundle",
    "portable_bundle",
    "profile_model",
    "quantize_model",
    "quantize_module",
    "recipe_schema",
    "render_report",
    "run_matrix",
    "run_recipe",
    "selftest_model",
    "show_history",
    "sign_bundle",
    "verify_bundle",
]

_HOMES = {
    "benchmarks.comparison": ("Comparison",),
    "benchmarks.device.verify": ("verify_bundle",),
    "benchmarks.doctor": ("DevicesReport", "DoctorReport", "check_devices", "check_this_machine"),
    "benchmarks.hardware.verb": ("HardwareReport", "hardware_report"),
    "benchmarks.history": ("accept_change", "add_to_history", "check_history", "keep_records", "show_history"),
    "benchmarks.profile_report": ("Profile",),
    "benchmarks.report": ("render_report",),
    "benchmarks.selftest": ("SelfTest",),
    "pipeline.ablation.run": ("ablate_recipe",),
    "pipeline.ablation.report": ("AblationReport",),
    "pipeline.bring_your_own": ("bench_model", "compile_model", "lint_model", "quantize_model"),
    "pipeline.bundles": ("bundle_schema", "pack_bundle", "portable_bundle", "sign_bundle"),
    "pipeline.compare_models": ("compare_models", "selftest_model"),
    "pipeline.matrix": ("MatrixReport", "export_results", "run_matrix"),
    "pipeline.onnx_ladder": ("Demands",),
    "pipeline.own_module": ("quantize_module",),
    "pipeline.profile_model": ("profile_model",),
    "pipeline.recipe": ("Recipe", "load_recipe", "recipe_schema"),
    "pipeline.run": ("RunResult", "run_recipe"),
    "pipeline.verb_reports": ("BenchReport", "CompileReport", "LintReport", "QuantizeReport"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edgestill' has no attribute '{name}'")
    value = getattr(import_module(_HOME_OF.get(name, "targets.errors")), name)
    globals()[name] = value  # the next use finds it without asking here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
