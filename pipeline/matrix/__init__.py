"""The matrix: models x runtimes x precisions x threads, measured by one recipe on one machine. run.py says the order."""

from pipeline.matrix.export import export_results
from pipeline.matrix.recipe import MatrixRecipe, load_matrix_recipe
from pipeline.matrix.report import MatrixReport
from pipeline.matrix.run import run_matrix

__all__ = ["MatrixRecipe", "MatrixReport", "export_results", "load_matrix_recipe", "run_matrix"]
