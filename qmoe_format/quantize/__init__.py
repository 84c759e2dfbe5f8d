"""From weights to levels and scales. Matrices only: no files, no container.

The registry of recipes needs no torch: a recipe's module is imported when it is first used.
"""

from qmoe_format.quantize.recipes import RECIPES, Recipe, recipe

__all__ = ["RECIPES", "Recipe", "recipe"]
