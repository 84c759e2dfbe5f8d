"""From weights to ternary weights (needs torch). Matrices only: no files, no container."""

from qmoe_format.quantize.recipes import RECIPES, Recipe, recipe
from qmoe_format.quantize.rtn import TernaryWeights, round_to_nearest

__all__ = ["RECIPES", "Recipe", "TernaryWeights", "recipe", "round_to_nearest"]
