"""From weights to ternary weights. Matrices only: no files, no container.

The recipes' names are here without torch; it is loaded when one is used.
"""

from qmoe_format.quantize.recipes import RECIPES, Recipe, recipe

__all__ = ["RECIPES", "Recipe", "recipe"]
